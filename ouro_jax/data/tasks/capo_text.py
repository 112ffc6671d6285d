"""The sentences of Capo's biographies: our own, 16 per attribute.

The original has 45 to 50 per attribute. Every sentence starts with its subject, so that a name
stands before all that is said about it; its verb is the same behind he, she and they; and it says
nothing about gender. `{}` is the value. The first two of each are short, and equally long.
"""

ATTRIBUTES = ("birth_date", "birth_city", "university", "major", "employer")

PHRASES: dict[str, tuple[str, ...]] = {
    "birth_date": (
        "entered life on {} .",
        "began life on {} .",
        "celebrated birthdays on {} .",
        "came into the world on {} .",
        "arrived on {} .",
        "first saw the light of day on {} .",
        "took a first breath on {} .",
        "turned one day old on {} .",
        "gave {} as the date of birth .",
        "wrote {} on every form .",
        "became part of a family on {} .",
        "started the journey of life on {} .",
        "counted the years from {} on .",
        "received a birth certificate dated {} .",
        "joined the people of this world on {} .",
        "shared a birthday with everyone born on {} .",
    ),
    "birth_city": (
        "came from {} .",
        "hailed from {} .",
        "called {} home .",
        "had roots in {} .",
        "grew up in {} .",
        "began life in {} .",
        "spent the early years in {} .",
        "took the first steps in {} .",
        "named {} as the place of birth .",
        "owed a happy childhood to {} .",
        "first lived in {} .",
        "had family in {} , the place of birth .",
        "remembered a childhood in {} .",
        "learned to walk in the streets of {} .",
        "started life in the city of {} .",
        "left {} only after school .",
    ),
    "university": (
        "studied at {} .",
        "graduated from {} .",
        "attended {} .",
        "went to {} .",
        "learned at {} .",
        "took courses at {} .",
        "held a degree from {} .",
        "completed a degree at {} .",
        "received an education at {} .",
        "listened to the teachers of {} .",
        "earned a degree from {} .",
        "passed all exams at {} .",
        "spent the student years at {} .",
        "benefited from the resources of {} .",
        "enrolled at {} after school .",
        "worked with the faculty of {} .",
    ),
    "major": (
        "studied {} .",
        "chose {} .",
        "majored in {} .",
        "learned {} .",
        "specialized in {} .",
        "wrote a thesis on {} .",
        "held a degree in {} .",
        "took {} as a major .",
        "learned all about {} .",
        "completed the program in {} .",
        "passed the exams in {} .",
        "had a deep interest in {} .",
        "devoted the student years to {} .",
        "focused on the field of {} .",
        "pursued an education in {} .",
        "read every book on {} .",
    ),
    "employer": (
        "worked for {} .",
        "worked at {} .",
        "joined {} .",
        "served {} .",
        "found work at {} .",
        "had a job at {} .",
        "built a career at {} .",
        "held a position at {} .",
        "earned a living at {} .",
        "strengthened the team of {} .",
        "spent the working years at {} .",
        "took a role at {} .",
        "gained experience at {} .",
        "signed a contract with {} .",
        "became a part of {} .",
        "received a salary from {} .",
    ),
}

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

BRANCHES = ("Applied", "Theoretical", "Modern", "Comparative", "General")
FIELDS = (
    "Biology", "Chemistry", "Physics", "Mathematics", "Geology", "Astronomy", "Linguistics",
    "History", "Philosophy", "Economics", "Finance", "Law", "Medicine", "Nursing", "Music",
    "Theater", "Architecture", "Statistics", "Psychology", "Geography",
)  # fmt: skip
MAJORS = tuple(f"{branch}_{subject}" for subject in FIELDS for branch in BRANCHES)

"""The generated mathematics is right, without repetition, and the same every time."""

import itertools
import re

from ouro_jax.data.arithmetic import problems

SAMPLE = list(itertools.islice(problems(seed=0), 5000))


def answer(problem: str) -> int:
    """Each problem solved from its text alone."""
    numbers = [int(number) for number in re.findall(r"\d+", problem)]
    if problem.startswith("Work modulo"):
        modulus, value = numbers[:2]
        for word, operand in re.findall(r"(add|subtract|multiply by) (\d+)", problem):
            n = int(operand)
            value = {"add": value + n, "subtract": value - n, "multiply by": value * n}[word]
        return value % modulus
    if problem.startswith("Find the inverse"):
        a, modulus = numbers
        return next(b for b in range(modulus) if a * b % modulus == 1)
    if "^" in problem:
        base, exponent, modulus = numbers
        return base**exponent % modulus
    a, b, modulus = numbers
    if "sum" in problem or "+" in problem:
        return (a + b) % modulus
    return (a - b if "difference" in problem or "-" in problem else a * b) % modulus


def test_every_answer_is_right():
    for problem, text in SAMPLE:
        assert text.startswith(problem + " ")
        assert int(re.findall(r"\d+", text)[-1]) == answer(problem), text


def test_every_stated_equation_holds():
    equations = 0
    for _, text in SAMPLE:
        for a, operator, b, result in re.findall(r"(\d+) ([+*-]) (\d+) = (-?\d+)[;,.]", text):
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator]
            modulus = re.match(r"Work modulo (\d+)", text)
            assert int(result) == (value % int(modulus[1]) if modulus else value), text
            equations += 1
    assert equations > 1000


def test_problems_do_not_repeat_and_follow_from_the_seed():
    assert len({problem for problem, _ in SAMPLE}) == len(SAMPLE)
    assert list(itertools.islice(problems(seed=0), 5000)) == SAMPLE
    assert next(problems(seed=1)) != SAMPLE[0]

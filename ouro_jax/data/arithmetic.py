"""Generated modular arithmetic in several forms: mathematics that a tiny model can learn."""

import random
from collections.abc import Iterator

PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31)


def problems(seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of (problem, full text), each problem once; text starts with problem."""
    random_numbers = random.Random(seed)
    forms = (_equation, _worked, _question, _chain, _inverse, _power)
    seen = set()
    while True:
        problem, rest = random_numbers.choice(forms)(random_numbers)
        if problem not in seen:
            seen.add(problem)
            yield problem, f"{problem} {rest}"


def _apply(operator: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def _operands(numbers: random.Random) -> tuple[int, str, int, int]:
    return (
        numbers.randrange(100),
        numbers.choice("+-*"),
        numbers.randrange(100),
        numbers.randrange(2, 32),
    )


def _equation(numbers: random.Random) -> tuple[str, str]:
    a, operator, b, modulus = _operands(numbers)
    return f"({a} {operator} {b}) mod {modulus} =", str(_apply(operator, a, b) % modulus)


def _worked(numbers: random.Random) -> tuple[str, str]:
    a, operator, b, modulus = _operands(numbers)
    value = _apply(operator, a, b)
    return (
        f"Compute {a} {operator} {b} modulo {modulus}.",
        f"{a} {operator} {b} = {value}, and {value} mod {modulus} = {value % modulus}.",
    )


def _question(numbers: random.Random) -> tuple[str, str]:
    a, operator, b, modulus = _operands(numbers)
    name = {"+": "sum", "-": "difference", "*": "product"}[operator]
    return (
        f"Question: what is the {name} of {a} and {b} modulo {modulus}?",
        f"Answer: {_apply(operator, a, b) % modulus}.",
    )


def _chain(numbers: random.Random) -> tuple[str, str]:
    modulus = numbers.choice(PRIMES[3:])
    value = numbers.randrange(modulus)
    steps, results = [], []
    problem = f"Work modulo {modulus}. Start with {value}."
    for _ in range(numbers.randrange(2, 6)):
        operator, operand = numbers.choice("+-*"), numbers.randrange(1, modulus)
        word = {"+": "add", "-": "subtract", "*": "multiply by"}[operator]
        result = _apply(operator, value, operand) % modulus
        steps.append(f"{word} {operand}")
        results.append(f"{value} {operator} {operand} = {result}")
        value = result
    return (
        f"{problem} Then {', '.join(steps)}.",
        f"{'; '.join(results)}. The result is {value}.",
    )


def _inverse(numbers: random.Random) -> tuple[str, str]:
    modulus = numbers.choice(PRIMES)
    a = numbers.randrange(1, 100 * modulus)
    a += a % modulus == 0  # a multiple of the modulus has no inverse
    inverse = pow(a, -1, modulus)
    return (
        f"Find the inverse of {a} modulo {modulus}.",
        f"{a} mod {modulus} = {a % modulus}, and {a % modulus} * {inverse} = "
        f"{a % modulus * inverse} = 1 mod {modulus}. The inverse is {inverse}.",
    )


def _power(numbers: random.Random) -> tuple[str, str]:
    a, exponent, modulus = numbers.randrange(2, 50), numbers.randrange(2, 9), numbers.choice(PRIMES)
    powers = ", ".join(str(pow(a, e, modulus)) for e in range(1, exponent + 1))
    return (
        f"What is {a}^{exponent} modulo {modulus}?",
        f"The powers are {powers}. Answer: {pow(a, exponent, modulus)}.",
    )

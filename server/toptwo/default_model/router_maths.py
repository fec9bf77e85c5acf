"""Worksheets of worked mathematics problems, the text of the router's domain "maths".

Knows templates and a random generator; must not know tokens, models or files.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from math import comb, gcd, isqrt, lcm


def worksheet(seed: int, held_out: bool, num_problems: int = 14) -> str:
    """`num_problems` problems with solutions; held-out worksheets have types of their own."""
    rng = random.Random(seed)  # noqa: S311
    templates = HELD_OUT if held_out else TRAINING
    return "\n\n".join(rng.choice(templates)(rng) for _ in range(num_problems)) + "\n"


def _linear(rng: random.Random) -> str:
    a, x, b = rng.randint(2, 19), rng.randint(-20, 20), rng.randint(1, 60)
    return (
        f"Solve {a}x + {b} = {a * x + b}.\nSubtract {b} from both sides: {a}x = {a * x}.\n"
        f"Divide by {a}: x = {x}."
    )


def _product(rng: random.Random) -> str:
    a, b = rng.randint(12, 99), rng.randint(12, 99)
    tens, ones = b // 10 * 10, b % 10
    return f"{a} * {b} = {a} * {tens} + {a} * {ones} = {a * tens} + {a * ones} = {a * b}"


def _quadratic(rng: random.Random) -> str:
    p, q = rng.randint(-9, 9), rng.randint(-9, 9)
    return (
        f"Find the roots of x^2 {-p - q:+d}x {p * q:+d} = 0.\n"
        f"The discriminant is D = {p + q}^2 - 4*({p * q}) = {(p - q) ** 2}, so sqrt(D) = {abs(p - q)}.\n"
        f"x_1 = {max(p, q)}, x_2 = {min(p, q)}."
    )


def _fractions(rng: random.Random) -> str:
    a, b = Fraction(rng.randint(1, 9), rng.randint(2, 12)), Fraction(rng.randint(1, 9), rng.randint(2, 12))
    return (
        f"Compute \\frac{{{a.numerator}}}{{{a.denominator}}} + \\frac{{{b.numerator}}}{{{b.denominator}}}.\n"
        f"The common denominator is {lcm(a.denominator, b.denominator)}, hence the sum is {a + b}."
    )


def _derivative(rng: random.Random) -> str:
    a, n, b = rng.randint(2, 12), rng.randint(2, 9), rng.randint(1, 30)
    return f"Let f(x) = {a}x^{n} + {b}x. Then f'(x) = {a * n}x^{n - 1} + {b} and f'(1) = {a * n + b}."


def _triangle(rng: random.Random) -> str:
    m = rng.randint(2, 9)
    n = rng.randint(1, m - 1)
    a, b, c = m * m - n * n, 2 * m * n, m * m + n * n
    return (
        f"A right triangle has legs a = {a} and b = {b}. By Pythagoras c^2 = {a * a} + {b * b} = {c * c}, "
        f"so c = {c}. Its area is \\frac{{1}}{{2}} * {a} * {b} = {Fraction(a * b, 2)}."
    )


def _percent(rng: random.Random) -> str:
    rate, base = rng.choice([5, 10, 12, 15, 20, 25, 30, 40]), rng.randint(2, 90) * 100
    return f"What is {rate}% of {base}? {rate}/100 * {base} = {rate * base // 100}."


def _series(rng: random.Random) -> str:
    first, step, count = rng.randint(1, 20), rng.randint(1, 9), rng.randint(5, 40)
    last = first + step * (count - 1)
    return (
        f"The arithmetic sequence a_n = {first} + {step}(n - 1) has a_{count} = {last}. "
        f"Its sum is S = {count}({first} + {last})/2 = {count * (first + last) // 2}."
    )


def _system(rng: random.Random) -> str:
    x, y = rng.randint(-9, 9), rng.randint(-9, 9)
    return (
        f"Solve the system x + y = {x + y}, x - y = {x - y}.\n"
        f"Adding both equations gives 2x = {2 * x}, so x = {x}; then y = {x + y} - ({x}) = {y}."
    )


def _logarithm(rng: random.Random) -> str:
    base, power = rng.randint(2, 9), rng.randint(2, 5)
    return f"\\log_{base}({base**power}) = {power}, because {base}^{power} = {base**power}."


def _binomial(rng: random.Random) -> str:
    n = rng.randint(4, 14)
    k = rng.randint(2, n - 1)
    return f"The number of ways to choose {k} of {n} is \\binom{{{n}}}{{{k}}} = {comb(n, k)}."


def _modular(rng: random.Random) -> str:
    a, b, m = rng.randint(10, 99), rng.randint(10, 99), rng.randint(3, 17)
    return (
        f"Since {a} \\equiv {a % m} and {b} \\equiv {b % m} \\pmod{{{m}}}, "
        f"{a} * {b} \\equiv {a * b % m} \\pmod{{{m}}}."
    )


def _integral(rng: random.Random) -> str:
    a, n, top = rng.randint(1, 9), rng.randint(1, 5), rng.randint(1, 6)
    value = Fraction(a * top ** (n + 1), n + 1)
    return (
        f"\\int_0^{top} {a}x^{n} dx = [ \\frac{{{a}}}{{{n + 1}}} x^{n + 1} ]_0^{top} = {value}. "
        f"Check: the antiderivative's derivative is {a}x^{n}."
    )


def _divisor(rng: random.Random) -> str:
    a, b = rng.randint(30, 400), rng.randint(30, 400)
    steps, x, y = [], max(a, b), min(a, b)
    while y:
        steps.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    return f"Euclid's algorithm for gcd({a}, {b}): " + "; ".join(steps) + f". So gcd = {gcd(a, b)}."


def _root(rng: random.Random) -> str:
    n = rng.randint(50, 2000)
    low = isqrt(n)
    return (
        f"{low}^2 = {low * low} \\le {n} < {(low + 1) ** 2} = {low + 1}^2, "
        f"so {low} \\le \\sqrt{{{n}}} < {low + 1}."
    )


def _matrix(rng: random.Random) -> str:
    a, b, c, d = (rng.randint(-9, 9) for _ in range(4))
    return (
        f"For A = [[{a}, {b}], [{c}, {d}]] the determinant is det A = ({a})({d}) - ({b})({c}) "
        f"= {a * d - b * c} and the trace is tr A = {a + d}."
    )


Template = Callable[[random.Random], str]
TRAINING: tuple[Template, ...] = (
    _linear, _product, _quadratic, _fractions, _derivative, _triangle,
    _percent, _series, _system, _logarithm, _binomial, _modular,
)  # fmt: skip
HELD_OUT: tuple[Template, ...] = (_integral, _divisor, _root, _matrix)

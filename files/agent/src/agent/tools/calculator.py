"""Arithmetic by walking a syntax tree: no name, attribute or call that is not listed here can be reached.

Every number stays within MAX_BITS, and what could grow (powers, factorials, binomials) is measured before it is
computed, so that no expression costs more than a few milliseconds.
"""

import ast
import functools
import math
import operator
from collections.abc import Callable

from langchain_core.tools import BaseTool, StructuredTool, ToolException

Number = int | float

MAX_CHARACTERS = 500
MAX_DEPTH = 250  # a sum of that many terms is that deep
MAX_BITS = 3400  # about a thousand decimal digits
MAX_OPERAND = 400  # of factorial, comb and perm


class CalculatorError(ToolException):
    """The expression is refused; the message tells the model why."""


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and (base.bit_length() - 1) * abs(exponent) > MAX_BITS:
        raise CalculatorError("the result is too large")
    result = base**exponent
    if isinstance(result, complex):
        raise CalculatorError("the result is not a real number")
    return result


def _small(function: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(function)
    def bounded(*arguments: Number) -> int:
        if any(abs(argument) > MAX_OPERAND for argument in arguments):
            raise CalculatorError(f"the arguments of {function.__name__} may be {MAX_OPERAND} at most")
        return function(*arguments)

    return bounded


def _round(number: Number, digits: int = 0) -> Number:
    if abs(digits) > 15:
        raise CalculatorError("round takes 15 digits at most")
    return round(number, digits) if digits else round(number)


OPERATORS: dict[type[ast.AST], Callable[..., Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FUNCTIONS: dict[str, Callable[..., Number]] = {
    **{
        function.__name__: function
        for function in (
            *(
                math.acos,
                math.asin,
                math.atan,
                math.atan2,
                math.cos,
                math.cosh,
                math.sin,
                math.sinh,
                math.tan,
                math.tanh,
            ),
            *(math.degrees, math.radians, math.exp, math.log, math.log2, math.log10, math.sqrt, math.hypot),
            *(math.ceil, math.fabs, math.floor, math.fmod, math.trunc, math.gcd, math.lcm),
            *(_small(math.comb), _small(math.factorial), _small(math.perm)),
        )
    },
    "abs": abs,
    "max": max,
    "min": min,
    "pow": _power,
    "round": _round,
}
CONSTANTS: dict[str, Number] = {"e": math.e, "pi": math.pi, "tau": math.tau}


def calculate(expression: str) -> str:
    """Return the value of an arithmetic expression, or raise CalculatorError."""
    if len(expression) > MAX_CHARACTERS:
        raise CalculatorError(f"the expression is longer than {MAX_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _format(_evaluate(tree.body, MAX_DEPTH))
    except CalculatorError:
        raise
    except ZeroDivisionError:
        raise CalculatorError("division by zero") from None
    except OverflowError:
        raise CalculatorError("the result is too large") from None
    except (SyntaxError, MemoryError, RecursionError):
        raise CalculatorError("this is not an arithmetic expression") from None
    except (TypeError, ValueError):
        raise CalculatorError("a function is not defined for these arguments") from None


def _evaluate(node: ast.expr, depth: int) -> Number:
    if depth == 0:
        raise CalculatorError("the expression is nested too deeply")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            result: Number = value
        case ast.Name(id=name) if name in CONSTANTS:
            result = CONSTANTS[name]
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in OPERATORS:
            result = OPERATORS[type(sign)](_evaluate(operand, depth - 1))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATORS:
            result = OPERATORS[type(sign)](_evaluate(left, depth - 1), _evaluate(right, depth - 1))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            result = FUNCTIONS[name](*(_evaluate(argument, depth - 1) for argument in arguments))
        case _:
            known = ", ".join(sorted(FUNCTIONS | CONSTANTS))
            raise CalculatorError(f"only numbers, + - * / // % **, brackets and these are known: {known}")
    if isinstance(result, int) and result.bit_length() > MAX_BITS:
        raise CalculatorError("the result is too large")
    if isinstance(result, float) and not math.isfinite(result):
        raise CalculatorError("the result is too large or undefined")
    return result


def _format(number: Number) -> str:
    # Fifteen digits are what a float keeps exactly: 0.1 + 0.2 is 0.3 to a reader.
    return str(number) if isinstance(number, int) else format(number, ".15g")


async def _calculate(expression: str) -> str:
    return calculate(expression)


def calculator_tool() -> BaseTool:
    return StructuredTool.from_function(
        coroutine=_calculate,
        name="calculator",
        description="Compute an arithmetic expression such as 2 * (3 + 4) ** 2 or sqrt(2) * pi.",
        handle_tool_error=True,
    )

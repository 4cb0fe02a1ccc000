"""A method that is not ours: `python:module:Class,key=value`, `python:FILE.py:Class,key=value`, or of a package."""

from compress_ssl.pipeline.methods import version1
from compress_ssl.pipeline.methods.base import Method
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.signatures import any_key
from compress_ssl.pipeline.runtime.user_object import UserObject


def method(user: UserObject) -> type[Method]:
    """Your own method: a subclass of compress_ssl.pipeline.methods.base.Method, from a module or a file.

    python:mine.py:Cosine,power=2 builds the class Cosine of mine.py with power=2. The keys are the arguments of its
    `__init__` besides `context`; a value is converted to the type of the argument's annotation. docs/methods.md
    shows how to write and test a method. Raises UserError for a place without such a class.
    """
    built = user.require_subclass(Method, "write one that returns one loss per student")  # type: ignore[type-abstract]
    takes, takes_any = user.signature.parameters, any_key(user.signature) is not None
    if "context" not in takes and "setting" not in takes and not takes_any:
        raise UserError(f"{user.name} does not take the method's context; write __init__(self, *, context, ...)")
    if "context" not in takes and ("setting" in takes or issubclass(built, version1.Method)):
        return version1.with_context(built, user.signature)
    return built

"""What settings are made of: kinds of numbers and words, each with its bounds."""
from __future__ import annotations

from typing import Annotated, Any, Literal, TypeGuard

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator


def _folder_name(name: str) -> str:
    if name.strip() != name or name in ("", ".", "..") or set(name) & set("/\\"):
        raise ValueError("must be a folder's name: not empty, without / and without spaces around it")
    return name


def _address(url: str) -> str:
    if url and not url.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    return url


LARGEST = 2**31 - 1     # of a count; tensors and libraries hold some of them in 32 bits
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Number = Annotated[int, Field(ge=0, le=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, AfterValidator(_folder_name)]
Address = Annotated[str, AfterValidator(_address)]
RulePolicy = Literal["auto", "text", "number", "choice", "yesno", "maths", "list", "judge"]
"""How answers are judged by rules; hdpo.reward.rules says what each does."""


class Section(BaseModel):
    """Part of the tree of settings: no unknown keys, no changes, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """True is no number, though Python takes it for 1; and no file, name or address holds control characters."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind in (int, float):
            raise ValueError("expected a number")
        if not is_section(kind) and _has_control_characters(value):
            raise ValueError("must not hold control characters")
        return value


def is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def _has_control_characters(value: Any) -> bool:
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return any(ord(character) < 32 or ord(character) == 127 for part in parts if isinstance(part, str) for character in part)

"""A recorded conversation as compact ids and mask, built with the functions that build a rollout.

Shape: a prompt (system, user), then assistant turns alternating with observations (role user or tool); it ends with an
assistant turn. The images belong to the `<image>` markers outside assistant turns, in order. A turn with a tool call
ends at </tool_call>, as a sampled one does, and the <|im_end|> behind it is given; the final turn's <|im_end|> is trained.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL.Image import Image

from hdpo.agent.chat import ChatFormat
from hdpo.agent.images import num_image_tokens, resized
from hdpo.agent.parse import TOOL_CALL_CLOSE
from hdpo.errors import DataError


def encode_demonstration(
        chat: ChatFormat, messages: Sequence[dict[str, str]], images: Sequence[Image], *,
        max_observation_tokens: int = 8192, max_images: int | None = None,
) -> tuple[list[int], list[int], tuple[Image, ...]]:
    """(token_ids [L], mask [L], bounded images): a recorded conversation as the rollout it could have been.

    Raises DataError for a conversation of any other shape.
    """
    plan = _plan(chat, messages, [i.size for i in images], max_observation_tokens, max_images)
    segment = chat.segment(plan.compact_ids, [resized(images[k], size) for k, size in plan.images])
    counts = iter([num_image_tokens(image.size, chat.factor) for image in segment.images])
    mask: list[int] = []
    for token, trained in zip(plan.compact_ids, plan.mask):
        mask += [trained] * (next(counts) if token == chat.image_token_id else 1)
    return segment.expanded_ids, mask, segment.images


def demonstration_length(chat: ChatFormat, messages: Sequence[dict[str, str]], sizes: Sequence[tuple[int, int]], *,
                         max_observation_tokens: int = 8192, max_images: int | None = None) -> int:
    """Tokens of `encode_demonstration`, from the original (width, height) of each image alone."""
    plan = _plan(chat, messages, sizes, max_observation_tokens, max_images)
    return len(plan.compact_ids) + sum(num_image_tokens(size, chat.factor) - 1 for _, size in plan.images)


@dataclass(slots=True)
class _Plan:
    """compact_ids and mask have equal length; `images` are the indices of the images that are shown, and the size."""

    compact_ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    images: list[tuple[int, tuple[int, int]]] = field(default_factory=list)

    def append(self, ids: list[int], trained: int) -> None:
        self.compact_ids += ids
        self.mask += [trained] * len(ids)


def _plan(chat: ChatFormat, messages: Sequence[dict[str, str]], sizes: Sequence[tuple[int, int]],
          max_observation_tokens: int, max_images: int | None) -> _Plan:
    """From image sizes (width, height) alone, so that lengths can be checked without pixels. Raises DataError."""
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    turns, replies = messages[first::2], messages[first + 1::2]
    if any(m["role"] != "assistant" for m in turns) or any(m["role"] == "assistant" for m in replies):
        raise DataError("assistant turns must alternate with observations")
    if len(turns) != len(replies) + 1:
        raise DataError("the conversation must end with an assistant turn")
    markers = [m["content"].count("<image>") if m["role"] != "assistant" else 0 for m in messages]
    if sum(markers) != len(sizes):
        hint = "" if sum(markers) else "; data.insert_markers=true puts them before the text"
        raise DataError(f"the messages hold {sum(markers)} <image> markers for {len(sizes)} images{hint}")

    seen = sum(markers[:first])
    plan = _Plan(images=[(k, chat.bounded_size(size)) for k, size in enumerate(sizes[:seen])])
    plan.append(chat.prompt_ids(messages[:first], sizes[:seen]), trained=0)
    for position, turn in enumerate(turns):
        last = position == len(replies)
        plan.append(_turn_ids(chat, turn["content"].strip(), last), trained=1)
        if last:
            break
        count = markers[first + 2 * position + 1]
        room = None if max_images is None else max_images - len(plan.images)
        ids, shown = chat.observation_ids(
            replies[position]["content"], sizes[seen:seen + count], max_observation_tokens, room)
        plan.append(ids, trained=0)
        plan.images += [(seen + k, size) for k, size in enumerate(shown) if size]
        seen += count
    return plan


def _turn_ids(chat: ChatFormat, content: str, last: bool) -> list[int]:
    calls = content.count(TOOL_CALL_CLOSE)
    if calls > 1 or (calls and not content.endswith(TOOL_CALL_CLOSE)) or (not calls and not last):
        raise DataError("an assistant turn must end with its only tool call, or be the last one and call nothing")
    return chat.encode_turn(content) + ([] if calls else [chat.end_of_turn_id])

"""Messages <-> token ids and vision tensors of one model; rollouts and demonstrations use the same functions.

Tokens are appended, never re-rendered: a prompt is rendered once by the chat template, an observation is tokenised by
itself and wrapped as a user turn. Text that comes from tools or data cannot turn into control or vision tokens.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image, effect_noise
from tokenizers import Tokenizer

from hdpo.agent.builder import Segment
from hdpo.agent.families import FAMILIES, Family
from hdpo.agent.images import bound_image, bounded_size, content_key, num_image_tokens, resized
from hdpo.agent.observation import cut_middle, images_room, images_that_fit
from hdpo.agent.parse import TOOL_CALL_CLOSE
from hdpo.agent.spelled import SpelledTag
from hdpo.errors import ConfigError, DataError, ModelError
from hdpo.pixels import PixelScale, expand, frame_patches
from hdpo.types import Vision

IMAGE_MARKER = "<image>"
TOOL_PICTURE = 5120 * 32 * 32
"""Largest picture of a tool that the model sees, pixels, where nothing else is said."""


class ChatFormat:
    """One model's tokenizer, image processor and image bounds. Made by `load_chat_format`; safe to use from threads.

    stop_ids    </tool_call> and <|im_end|>: where a generation ends
    spelled_end </tool_call> as ordinary tokens may spell it: ends one too
    banned_ids  all other control tokens (vision placeholders, <|im_start|>, ...): never to be sampled, or the counts of
                placeholders and images would part; and ids of a padded head that no token has. Engine and trainer both leave
                them out of the softmax
    min_pixels, max_pixels  the given bounds narrowed to those of the image processor, so that it resizes nothing
    max_tool_pixels         the bound of pictures that tools return, max_pixels at most
    tells_sizes             whether each picture's own size is written behind it: tools have it at that size
    image_token_id          None for a text-only model: prompts with images are refused, images of tools are left out
    """

    def __init__(self, family: Family, tokenizer: Any, image_processor: Any, min_pixels: int, max_pixels: int,
                 head_size: int = 0, max_tool_pixels: int = TOOL_PICTURE, tells_sizes: bool = False) -> None:
        """`image_processor` is None for a text-only model. `head_size`: rows of its head, ids it could sample."""
        self.family, self.tells_sizes = family, tells_sizes
        self._template = tokenizer
        self._processor = image_processor
        # Copies of the Rust tokenizer: transformers' wrapper changes shared state while it encodes, which threads trip over
        description = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        self._control = Tokenizer.from_str(json.dumps(description))          # parses every added token
        self._turn = Tokenizer.from_str(json.dumps(description))             # parses <tool_call>, no special token
        self._turn.encode_special_tokens = True
        self._plain = Tokenizer.from_str(json.dumps(description | {"added_tokens": []}))   # parses none
        special = {token.content: id for id, token in self._control.get_added_tokens_decoder().items() if token.special}
        self.tool_call_end_id = self._single_token(TOOL_CALL_CLOSE)
        self.end_of_turn_id = self._single_token(family.end_of_turn)
        if self.decode([self.tool_call_end_id]) != TOOL_CALL_CLOSE:
            raise ModelError(f"the tokenizer hides {TOOL_CALL_CLOSE} in decoded text: it must be added with special=False")
        self._control_words = tuple(special)
        words = f"{family.name}\0{json.dumps(description)}\0{tokenizer.chat_template}"
        self._words = hashlib.sha256(words.encode()).hexdigest()
        known = self._control.get_vocab(with_added_tokens=True).values()
        unknown = set(range(head_size)).difference(known)
        self.banned_ids = tuple(sorted(set(special.values()) - {self.end_of_turn_id} | unknown))
        texts = self._control.decode_batch([[id] for id in range(max(known) + 1)], skip_special_tokens=True)
        self.spelled_end = SpelledTag(TOOL_CALL_CLOSE, texts)
        self._image_words = "".join(family.image_words or ())
        self._image_block = self._encode(self._control, self._image_words)
        self._open, self._close = (self._encode(self._control, s) for s in family.observation_words)
        self.image_token_id: int | None = None
        self.scale: PixelScale | None = None
        self.merge_size, self.factor, self.min_pixels, self.max_pixels = 1, 1, min_pixels, max_pixels
        if family.image_words:
            self.image_token_id = self._single_token(family.image_words[1])
            self.merge_size = int(image_processor.merge_size)
            self.factor = int(image_processor.patch_size) * self.merge_size
            self.min_pixels, self.max_pixels = self._narrow(min_pixels, max_pixels)
            self.scale = self._frame_scale()
        self.max_tool_pixels = max(min(max_tool_pixels, self.max_pixels), self.min_pixels)

    @property
    def fingerprint(self) -> str:
        """Equal for formats that make the same tokens of the same messages and image sizes."""
        return f"{self._words}/{self.factor}/{self.min_pixels}/{self.max_pixels}/{self.max_tool_pixels}/{self.tells_sizes}"

    @property
    def stop_ids(self) -> tuple[int, int]:
        return self.tool_call_end_id, self.end_of_turn_id

    def _single_token(self, text: str) -> int:
        ids = self._encode(self._control, text)
        if len(ids) != 1:
            raise ModelError(f"{text} is not a single token of this tokenizer; {self.family.name} has it as one")
        return ids[0]

    def _narrow(self, min_pixels: int, max_pixels: int) -> tuple[int, int]:
        size = self._processor.size
        low, high = max(min_pixels, size["shortest_edge"]), min(max_pixels, size["longest_edge"])
        try:
            bounded_size(1024, 1024, self.factor, low, high)
        except ValueError:
            raise ConfigError(
                f"model.min_pixels..max_pixels ({min_pixels}..{max_pixels}) and the image processor's own bounds "
                f"({size['shortest_edge']}..{size['longest_edge']}) leave no image size") from None
        return low, high

    @staticmethod
    def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens; tags such as </tool_call> stay. For parsing and display, never re-encoded."""
        return self._control.decode(list(token_ids), skip_special_tokens=True)

    def encode_turn(self, text: str) -> list[int]:
        """An assistant turn as the policy would write it: <tool_call> is its own token, control tokens are not parsed."""
        return self._encode(self._turn, text)

    # -- images ---------------------------------------------------------------------------------------------------

    @property
    def sees(self) -> bool:
        return self.image_token_id is not None

    def bound(self, image: Image) -> Image:
        """A prompt's image as the model sees it; the same object if it already is."""
        return bound_image(image, self.factor, self.min_pixels, self.max_pixels)

    def image_tokens(self, size: tuple[int, int]) -> int:
        """Placeholder tokens of a prompt's image of `size` (width, height) after bounding."""
        return num_image_tokens(self.bounded_size(size), self.factor)

    def bounded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """A prompt's image of `size` (width, height) as the model sees it."""
        return bounded_size(*size, self.factor, self.min_pixels, self.max_pixels)

    def vision(self, images: Sequence[Image]) -> Vision | None:
        """The patches of bounded images; None for none."""
        if not images or self.scale is None:
            return self._processed(images)
        side = self.factor // self.merge_size
        grid = [[1, image.height // side, image.width // side] for image in images]
        return Vision(tuple(frame_patches(_tensor(image), side, self.merge_size) for image in images), torch.tensor(grid),
                      self.scale)

    def _frame_scale(self) -> PixelScale | None:
        """How the processor scales pixels. None if it does anything else besides: then its own tensors are kept."""
        given = self._processor
        mean, std = (tuple((torch.tensor(part) * (1.0 / given.rescale_factor)).tolist())
                     for part in (given.image_mean, given.image_std))
        scale = PixelScale(mean, std, int(given.temporal_patch_size))
        probe = self.bound(effect_noise((3 * self.factor, 2 * self.factor), 100).convert("RGB"))
        processed = self._processed([probe])
        assert processed is not None
        patches = frame_patches(_tensor(probe), self.factor // self.merge_size, self.merge_size)
        return scale if torch.equal(expand(patches, scale), processed.pixel_values) else None

    def _processed(self, images: Sequence[Image]) -> Vision | None:
        """The processor's tensors. Checks the grid against the placeholder counts."""
        if not images:
            return None
        output = self._processor(images=list(images), return_tensors="pt")
        grid = output["image_grid_thw"]
        counts = (grid.prod(-1) // self._processor.merge_size**2).tolist()
        expected = [num_image_tokens(image.size, self.factor) for image in images]
        if counts != expected:
            raise ModelError(f"the image processor makes {counts} tokens of images that hold {expected} placeholders")
        return Vision(output["pixel_values"].split(grid.prod(-1).tolist()), grid)

    def segment(self, compact_ids: list[int], images: Sequence[Image], files: Sequence[bytes] = ()) -> Segment:
        """Expand the k-th placeholder to the k-th image's token count."""
        counts = iter([num_image_tokens(image.size, self.factor) for image in images])
        pad, expanded = self.image_token_id, []
        for token in compact_ids:
            expanded += [pad] * next(counts) if token == pad else [token]
        return Segment(compact_ids, expanded, tuple(images), tuple(content_key(image) for image in images), tuple(files))

    # -- what the policy is given -----------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[dict[str, str]], images: Sequence[Image], files: Sequence[bytes] = ()) -> Segment:
        """Render the chat template with generation prompt; the k-th `<image>` of the user messages is images[k].

        Raises DataError if markers and images differ in number or a message holds control tokens.
        """
        ids = self.prompt_ids(messages, [image.size for image in images])
        return self.segment(ids, [self.bound(image) for image in images], files)

    def prompt_length(self, messages: Sequence[dict[str, str]], sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens of `prompt` with images expanded, from the original (width, height) of each image alone."""
        return len(self.prompt_ids(messages, sizes)) + sum(self.image_tokens(size) - 1 for size in sizes)

    def prompt_ids(self, messages: Sequence[dict[str, str]], sizes: Sequence[tuple[int, int]]) -> list[int]:
        """The compact ids of `prompt`, from the original (width, height) of each image alone."""
        num_images = len(sizes)
        if num_images and not self.sees:
            raise DataError(f"{self.family.name} models see no images, and the prompt has {num_images}")
        markers = sum(m["content"].count(IMAGE_MARKER) for m in messages if m["role"] == "user")
        if markers != num_images:
            hint = "" if markers else "; data.insert_markers=true puts them before the text"
            raise DataError(f"the user messages hold {markers} {IMAGE_MARKER} markers for {num_images} images{hint}")
        rendered, numbered = [], enumerate(sizes, start=1)
        for message in messages:
            role, content = message["role"], message["content"]
            self._refuse_control_words(content)
            if role == "user":
                content = self._with_images(content, numbered)
            rendered.append({"role": role, "content": content})
        text = self._template.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
        ids = self._encode(self._control, text)
        if self.image_token_id is not None and ids.count(self.image_token_id) != num_images:
            raise ModelError("the model's chat template changes the number of image placeholders")
        return ids

    def _with_images(self, content: str, sizes: Iterator[tuple[int, tuple[int, int]]]) -> str:
        """Each marker as the words of an image, and behind it, where that is set, its name in the tools and its own size."""
        first, *rest = content.split(IMAGE_MARKER)
        told = [f" (image_{number}: {wide} x {high} pixels)" * self.tells_sizes
                for number, (wide, high) in islice(sizes, len(rest))]
        return first + "".join(self._image_words + size + piece for size, piece in zip(told, rest, strict=True))

    def _refuse_control_words(self, content: str) -> None:
        for word in self._control_words:
            if word in content:
                raise DataError(f"a message holds the control token {word}")

    def observation(self, text: str, images: Sequence[Image], max_tokens: int, max_images: int | None = None,
                    files: Sequence[bytes] = ()) -> Segment:
        """A tool's answer as the next user turn, closing the turn before and opening the next (the reference's wrapper).

        At most `max_tokens` tokens with images expanded, wrapper not counted, and `max_images` images. One rule: text
        keeps a quarter of the room if it needs it, an image that alone is larger than the rest is scaled to it, images are
        kept whole in order while they fit the rest, then text is cut in its middle. Cut tokens and dropped images are named.
        Images stand at the `<image>` markers if there is one for each, else after the text. No part of the text becomes a
        control, vision or tool-call token.
        """
        compact, seen = self.observation_ids(text, [image.size for image in images], max_tokens, max_images)
        return self.segment(compact, [resized(image, size) for image, size in zip(images, seen) if size],
                            [file for file, size in zip(files, seen) if size])

    def observation_ids(self, text: str, sizes: Sequence[tuple[int, int]], max_tokens: int,
                        max_images: int | None = None) -> tuple[list[int], list[tuple[int, int] | None]]:
        """(compact ids, the size at which each image is seen, None for those that are dropped) of `observation`, from the
        original sizes alone."""
        pieces = text.split(IMAGE_MARKER)
        if len(pieces) != len(sizes) + 1:
            pieces = [text] + [""] * len(sizes)
        ids = [self._encode(self._plain, piece) for piece in pieces]
        if self.sees:
            block = [self._image_block + self._size_words(size) for size in sizes]
            room = images_room(sum(map(len, ids)), max_tokens)
            seen = [self._tool_image_size(size, room - len(words) + 1) for size, words in zip(sizes, block)]
            costs = [num_image_tokens(size, self.factor) + len(words) - 1 for size, words in zip(seen, block)]
            kept = images_that_fit(costs, room, len(sizes) if max_images is None else max_images)
        else:
            costs, kept, block, seen = [0] * len(sizes), [False] * len(sizes), [[]] * len(sizes), list(sizes)
        if dropped := kept.count(False):
            reason = "they exceed the limit" if self.sees else "only text can be shown"
            note = f"\n[{dropped} of {len(sizes)} images are not shown: {reason}]"
            ids[-1] = ids[-1] + self._encode(self._plain, note)
        room = max_tokens - sum(cost for cost, keep in zip(costs, kept) if keep)
        ids = cut_middle(ids, room, lambda n: self._encode(self._plain, f"\n[... {n} tokens cut ...]\n"))
        compact = list(self._open)
        for piece, keep, words in zip(ids, [*kept, False], [*block, []]):
            compact += piece + (words if keep else [])
        return compact + self._close, [size if keep else None for size, keep in zip(seen, kept)]

    def _size_words(self, size: tuple[int, int]) -> list[int]:
        return self._encode(self._plain, f" ({size[0]} x {size[1]} pixels)") if self.tells_sizes else []

    def _tool_image_size(self, size: tuple[int, int], room: int) -> tuple[int, int]:
        """A tool's image of `size` as the model sees it, scaled to `room` tokens if they hold an image at all."""
        whole = bounded_size(*size, self.factor, self.min_pixels, self.max_tool_pixels)
        most = room * self.factor**2
        if whole[0] * whole[1] <= most or most < self.min_pixels:
            return whole
        with contextlib.suppress(ValueError):      # no grid between such close bounds
            return bounded_size(*size, self.factor, self.min_pixels, most)
        return whole


def _tensor(image: Image) -> torch.Tensor:
    """[height, width, 3] uint8."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def load_chat_format(model_path: str, min_pixels: int, max_pixels: int, max_tool_pixels: int = TOOL_PICTURE,
                     tells_sizes: bool = False) -> ChatFormat:
    """Read tokenizer and image processor of a Hugging Face folder; no weights, no network.

    Raises ModelError with one line for a folder that is missing, incomplete or of another family.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    folder = Path(model_path)
    if not model_path:
        raise ModelError("model.path is not set: give --set model.path=FOLDER or MODEL_PATH=FOLDER")
    if not folder.is_dir():
        raise ModelError(f"model.path: no such folder: {model_path}")
    try:
        config = json.loads((folder / "config.json").read_text())
        kind, head_size = config.get("model_type"), (config.get("text_config") or config).get("vocab_size") or 0
    except (OSError, ValueError) as exc:
        raise ModelError(f"{folder}: config.json is missing or unreadable ({exc.__class__.__name__})") from exc
    if kind not in FAMILIES:
        raise ModelError(f"{folder}: model_type {kind!r} is not supported; known are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True) if family.image_words else None
    except (OSError, ValueError, KeyError) as exc:
        missing = "" if (folder / "tokenizer.json").is_file() else "tokenizer.json is missing, and "
        raise ModelError(
            f"{folder}: {missing}tokenizer or image processor can't be loaded: {' '.join(str(exc).split())}") from exc
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{folder}: the tokenizer has no chat template")
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelError(f"{folder}: tokenizer.json is missing, a fast tokenizer is needed")
    try:
        return ChatFormat(family, tokenizer, image_processor, min_pixels, max_pixels, head_size, max_tool_pixels, tells_sizes)
    except ModelError as exc:
        missing = "" if (folder / "tokenizer.json").is_file() else " is missing"
        raise ModelError(f"{folder}/tokenizer.json{missing}: {exc}") from exc

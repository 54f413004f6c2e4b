"""Settings of `hdpo curate`: the section `curation` of the configuration."""
from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat

from hdpo.config.types import Count, Number, Section, Share

NO_TOOLS = ("You answer questions about pictures. No tools are available. Think step by step inside <reason></reason>, then give "
            "the final answer inside <answer></answer>.")


class ExecutionSettings(Section):
    mismatch: Literal["drop", "rewrite"] = Field(
        "drop", description="A row whose code gives another observation than the recorded one is dropped, or gets the real one.")
    search: Literal["keep", "replay", "drop"] = Field(
        "keep", description="Recorded searches stay as they are, are made again (caches first), or drop the row.")
    number_tolerance: float = Field(1e-3, ge=0, le=1, description="Relative difference of two printed numbers that are the same.")
    picture_tolerance: float = Field(
        0.05, ge=0, le=1, description="Mean difference of two pictures that look the same, as a share of the range.")


class NecessitySettings(Section):
    samples: Count = Field(8, description="Rollouts without tools of each question.")
    threshold: Share = Field(
        1.0, description="A row is dropped when this share of its scored samples is right; 0.125 drops what one of eight solves.")
    temperature: float = Field(1.0, ge=0, le=2, description="Sampling temperature of these rollouts.")
    system: str = Field(NO_TOOLS, description="System message of these rollouts, in place of the recorded one.")
    tool_rows_only: bool = Field(True, description="Ask only of rows that call a tool; the others teach when not to call one.")


class JudgementSettings(Section):
    visual_relevance: int = Field(3, ge=1, le=5, description="Least score that keeps a row, of 1 to 5.")
    reasoning_coherence: int = Field(3, ge=1, le=5, description="Least score that keeps a row, of 1 to 5.")
    tool_rationale: int = Field(3, ge=1, le=5, description="Least score that keeps a row, of 1 to 5.")
    attempts: Count = Field(3, description="Times an unreadable reply is asked again before the row waits.")
    send_images: bool = Field(True, description="Show the judge the pictures, which needs one that sees.")
    max_images: Number = Field(4, description="Pictures shown to the judge.")
    max_chars: Count = Field(16_000, description="Longest trajectory shown to the judge, characters; the middle is cut.")


class DecontaminationSettings(Section):
    data: str = Field("", description="Folder with a folder per benchmark, as for `hdpo eval`; empty compares with none.")
    benchmarks: list[str] = Field(default_factory=list, description="Benchmarks compared with; empty is all that data holds.")
    action: Literal["drop", "report"] = Field(
        "drop", description="Rows that overlap with a benchmark are dropped, or kept with a note in extra_info.")
    unknown: Literal["keep", "drop"] = Field(
        "keep", description="What becomes of a row with a picture that can't be compared (one colour, say); counted anyhow.")
    picture_bits: int = Field(14, ge=0, le=32, description="Differing bits of 64 up to which two pictures are looked at closely.")
    picture_likeness: float = Field(
        0.95, gt=0, le=1, description="Correlation of two pictures, at the best of slight crops, from which they are the same.")
    question_ngram: Count = Field(3, description="Words of the runs in which questions are compared.")
    question_share: float = Field(0.5, gt=0, le=1, description="Share of a benchmark question's runs that makes it the same.")
    question_words: Count = Field(8, description="Words below which a benchmark's question is compared as a whole.")


class PromptSettings(Section):
    count: Number = Field(0, description="Prompts for RL over all sources; 0 is as many as the shares allow.")
    shares: dict[str, NonNegativeFloat] = Field(
        default_factory=dict, description="Part of each source, such as {deepeyes: 45, thyme: 36, openmm: 19}; empty: all rows.")
    system: str = Field("", description="System message of the prompts; empty is hdpo's own, with tools.allowed.")


class CurationConfig(Section):
    sources: list[str] = Field(
        default_factory=list, description="What is curated, as NAME=FILES with the name of a reader (--source).")
    out: str = Field("", description="Folder of the result (--out).")
    chunk_rows: Count = Field(32, description="Rows that are finished and kept together; a killed job repeats at most these.")
    concurrency: Count = Field(8, description="Rows of a chunk that are worked on at once.")
    execution: ExecutionSettings = Field(default_factory=ExecutionSettings)
    necessity: NecessitySettings = Field(default_factory=NecessitySettings)
    judgement: JudgementSettings = Field(default_factory=JudgementSettings)
    decontamination: DecontaminationSettings = Field(default_factory=DecontaminationSettings)
    prompts: PromptSettings = Field(default_factory=PromptSettings)

"""Draw from prompts with any pipeline of diffusers, unmodified: what its call takes, pixels that come back."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qandc.caching.schedule import CacheConfig
from qandc.errors import ConfigError, DataError, ModelError
from qandc.sampling.pipelines import embedded_name

__all__ = [
    "RUN",
    "call_arguments",
    "check_prompts",
    "draw_prompt",
    "of_prompts",
    "steps_of_run",
    "text_length",
    "usual_steps",
    "warn_of_unread",
]

logger = logging.getLogger(__name__)

RUN = ("height", "width", "num_inference_steps", "guidance_scale", "negative_prompt")  # arguments that most take
USUAL_STEPS = 50  # of a pipeline that does not say
SHOWN_WORDS = 10


def _parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipe).__call__).parameters


def usual_steps(pipe: Any) -> int:
    """Return the number of denoising steps that a pipeline takes if nobody says one."""
    found = _parameters(pipe).get("num_inference_steps")
    return found.default if found is not None and isinstance(found.default, int) else USUAL_STEPS


def steps_of_run(pipe: Any, arguments: dict[str, Any], cache: CacheConfig | None) -> int:
    """Return the steps of a run; where none are given and a cache is for one length, ``arguments`` get as many.

    Raises:
        ConfigError: the cache is for another number of steps.
    """
    if cache is not None and cache.length is not None and getattr(pipe.scheduler, "order", 1) == 1:
        cache.of_steps(arguments.setdefault("num_inference_steps", cache.length))
    return arguments.get("num_inference_steps") or usual_steps(pipe)


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse a list that holds no prompt, or an empty one.

    Raises:
        ConfigError: it does.
    """
    empty = next((i for i, prompt in enumerate(prompts, 1) if not prompt.strip()), 0)
    if empty or not prompts:
        raise ConfigError(f"{f'prompt {empty} is empty' if empty else 'there is no prompt'}; give text in each")


def _readers(pipe: Any) -> list[Any]:
    """Return the tokenizers whose tokens ``max_sequence_length`` counts: those of all text encoders but CLIP's."""
    pairs = ((part, pipe.components.get(f"text_encoder{name[9:]}")) for name, part in _tokenizers(pipe).items())
    return [part for part, encoder in pairs if encoder is not None and not type(encoder).__name__.startswith("CLIP")]


def _tokenizers(pipe: Any) -> dict[str, Any]:
    return {n: part for n, part in pipe.components.items() if n.startswith("tokenizer") and part is not None}


def text_length(pipe: Any) -> dict[str, int]:
    """Return ``max_sequence_length`` for calls of a pipeline whose default pads to more tokens than are kept."""
    usual = getattr(_parameters(pipe).get("max_sequence_length"), "default", None)
    limits = [getattr(tokenizer, "model_max_length", None) for tokenizer in _readers(pipe)]
    longest = max((limit for limit in limits if isinstance(limit, int)), default=None)
    return {} if usual is None or longest is None or longest >= usual else {"max_sequence_length": longest}


def warn_of_unread(pipe: Any, prompts: Sequence[str]) -> None:
    """Log what a pipeline leaves out of prompts silently: tokens that are too many, words that no tokenizer knows."""
    longest = getattr(_parameters(pipe).get("max_sequence_length"), "default", None)
    for prompt in prompts:
        cut = []
        for tokenizer in _tokenizers(pipe).values():
            limits = (getattr(tokenizer, "model_max_length", None), longest)
            limit = min(value for value in (*limits, 1 << 20) if isinstance(value, int))
            count = len(tokenizer(prompt, verbose=False).input_ids)
            cut.append((count, limit))
        if cut and all(count > limit for count, limit in cut):
            count, limit = max(cut, key=lambda pair: pair[1])
            logger.warning(
                "a prompt has %d tokens, of which %s reads %d: %.60s...", count, type(pipe).__name__, limit, prompt
            )
    readers = [tokenizer for tokenizer in _readers(pipe) if getattr(tokenizer, "unk_token_id", None) is not None]
    words = dict.fromkeys(word.strip(".,;:!?\"'()") for prompt in prompts for word in prompt.split())

    def is_unknown(word: str) -> bool:
        return all(reader.unk_token_id in reader(word, add_special_tokens=False).input_ids for reader in readers)

    unknown = [repr(word) for word in words if is_unknown(word)] if readers else []
    if unknown:
        more = f" and {len(unknown) - SHOWN_WORDS} more" if len(unknown) > SHOWN_WORDS else ""
        shown = ", ".join(unknown[:SHOWN_WORDS]) + more
        logger.warning("%s does not know these words, and draws without them: %s", type(pipe).__name__, shown)


def call_arguments(pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a pipeline by the names that it has for them; None leaves one out.

    Guidance that the pipeline takes but would leave out is logged. wardrobe has one size, and guidance by a second
    pass with another prompt; its pipeline does not know.

    Args:
        pipe: draws from prompts.
        given: values of ``RUN``.

    Raises:
        ModelError: the pipeline takes no prompt.
        ConfigError: it does not take or read one of the others, or has another size.
    """
    known, kind = _parameters(pipe), type(pipe).__name__
    if "prompt" not in known:
        raise ModelError(f"{kind} takes no prompt")
    arguments = {name: value for name, value in given.items() if value is not None}
    if embedded_name(pipe.name_or_path) == "wardrobe":
        side = pipe.vae.config.sample_size
        for name in ("height", "width"):
            if arguments.setdefault(name, side) != side:
                raise ConfigError(f"{name} is {arguments[name]}; wardrobe draws {side} x {side} pixels: leave it out")
        if "negative_prompt" in arguments and arguments.get("guidance_scale", 1) <= 1:
            raise ConfigError("negative_prompt is not read without guidance; give a guidance_scale above 1 too")
        if "guidance_scale" in arguments:
            guided = {"true_cfg_scale": arguments.pop("guidance_scale"), "negative_prompt": ""}
            arguments = {**guided, **arguments}
    elif "true_cfg_scale" in known:
        if known["guidance_scale"].default is None and "guidance_scale" in arguments:  # Qwen-Image
            arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
            if arguments["true_cfg_scale"] > 1 and "negative_prompt" not in arguments:
                logger.warning('%s guides only with a negative prompt, if but " ", and draws without guidance', kind)
        elif known["true_cfg_scale"].default <= 1 and "negative_prompt" in arguments:  # FLUX.1
            raise ConfigError(f"{kind} is distilled for guidance and reads no negative prompt; leave it out")
        elif "guidance_scale" in arguments and not pipe.transformer.config.guidance_embeds:  # FLUX.1-schnell
            logger.warning("%s reads no guidance scale: its transformer was trained without guidance", kind)
    strangers = arguments.keys() - known.keys()
    if strangers:
        raise ConfigError(f"{kind} takes no {min(strangers)}; leave it out")
    return {**text_length(pipe), **arguments}


def of_prompts(
    prompts: Sequence[str], generators: Sequence[torch.Generator], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call that draws prompts at once; other texts become lists of as many.

    diffusers broadcasts a single negative prompt in most pipelines, and fails in some (Z-Image).
    """
    if len(prompts) == 1:  # some pipelines take one alone
        return {**given, "prompt": prompts[0], "generator": generators[0]}
    texts = {
        name: [value] * len(prompts) for name, value in given.items() if "prompt" in name and isinstance(value, str)
    }
    return {**given, **texts, "prompt": list(prompts), "generator": list(generators)}


@torch.no_grad()
def draw_prompt(pipe: Any, prompt: str, seed: int, arguments: Mapping[str, Any]) -> torch.Tensor:
    """Draw one image from a prompt: ``[1, C, H, W]`` in [-1, 1], float32, on the CPU.

    Of a video these are its first, middle and last frame, side by side.

    Raises:
        DataError: the pipeline does not return pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    made = pipe(prompt=prompt, generator=generator, output_type="pt", return_dict=False, **arguments)[0]
    if not isinstance(made, torch.Tensor) or made.ndim not in (4, 5):
        raise DataError(f"{type(pipe).__name__} returned {type(made).__name__}; images or frames are compared here")
    if made.ndim == 5:
        made = torch.cat([made[:, i] for i in (0, made.shape[1] // 2, -1)], -1)
    return made.float().cpu() * 2 - 1

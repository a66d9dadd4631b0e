"""Help texts that several commands share."""

from __future__ import annotations

MODEL = "Pipeline directory or hub id, e.g. facebook/DiT-XL-2-256. Default: fashion-dit."
MODEL_OR_SETTINGS = f"{MODEL} Or what qandc calibrate wrote, which names its pipeline."
STEPS, GUIDANCE = "Denoising steps.", "Classifier-free guidance; 1 turns it off."
W_BITS, A_BITS = "Bits of the weights: 4 or 8.", "Bits of the activations: 4 to 8."
DEVICE, DTYPE = "auto, cpu, cuda or cuda:N.", "auto, float32, bfloat16 or float16."

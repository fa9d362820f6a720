"""The thin diffusers layer: captions, LoRA training, sampling, evaluation; extras bring the libraries beneath it."""

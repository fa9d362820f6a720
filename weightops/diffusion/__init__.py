"""The thin diffusers layer: captions, LoRA training, sampling, evaluation. The libraries do the work; extras bring them."""

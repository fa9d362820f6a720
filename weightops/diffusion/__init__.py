"""The thin diffusers layer: captions, LoRA training, sampling, evaluation. Extras bring the libraries that do the work."""

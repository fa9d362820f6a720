"""The arithmetic of models: tensors in, tensors out. Knows no files, no names, no devices."""

"""The arithmetic of models: tensors in, tensors out. Knows no files, no names, no devices."""

# The design's map calls this folder merge/. It is merging/ because `weightops.merge` is the function: importing a
# subpackage sets the attribute of its name on the parent, and would hide the function, at some times and not at others.

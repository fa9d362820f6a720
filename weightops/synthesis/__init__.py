"""New LoRAs from a space of LoRAs: collected, made comparable, learnt as a space, sampled, edited, fitted, measured."""

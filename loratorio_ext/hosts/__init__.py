"""One file a host: which LoRAs are active, their conditionings, how to call the model, where the result goes."""

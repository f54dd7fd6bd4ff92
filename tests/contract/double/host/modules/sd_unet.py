"""Another UNet (TensorRT and the like) in the model's place; here never one."""

current_unet = None

"""Another UNet (TensorRT and the like) in the model's place; here never one."""


def get_unet_option(option=None):
    return None

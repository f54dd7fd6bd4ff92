"""What samplers and their denoiser share."""


class InterruptedException(BaseException):
    """Sampling ends here, with the latents reached so far."""

"""The host's own components."""

import gradio as gr


class InputAccordion(gr.Checkbox):
    """An accordion whose header's tick box is its value."""

    def __init__(self, value: bool, **properties):
        super().__init__(value=value, **properties)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

"""Requests as dicts of JSON to images, with the API's ways of filling in scripts' values and of failing."""

import base64
import inspect
import io
from contextlib import closing
from typing import Any

from PIL import Image

from modules import errors, processing, sd_samplers, shared
from modules.infotext_utils import parse_generation_parameters
from modules.scripts import ScriptRunner


class HTTPException(Exception):
    """A refusal; ``status_code`` and ``detail`` go to the client, as they do from any exception that has them."""

    def __init__(self, status_code: int, detail: str):
        super().__init__(detail)
        self.status_code, self.detail = status_code, detail


def error_answer(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body for an exception."""
    said = vars(error)
    body = {
        "error": type(error).__name__,
        "detail": said.get("detail", ""),
        "body": said.get("body", ""),
        "errors": str(error),
    }
    if not isinstance(error, HTTPException):
        errors.report(f"API error: {body}", exc_info=True)
    return said.get("status_code", 500), body


def decode_image(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded.rpartition(",")[2])))


class Api:
    def __init__(self, outputs: str = ""):
        self.outputs = outputs
        self.runners = {"txt2img": ScriptRunner(is_img2img=False), "img2img": ScriptRunner(is_img2img=True)}

    def txt2img(self, request: dict[str, Any]) -> processing.Processed:
        return self.generate("txt2img", processing.StableDiffusionProcessingTxt2Img, request)

    def img2img(self, request: dict[str, Any]) -> processing.Processed:
        request = dict(request)
        images = [decode_image(image) for image in request.pop("init_images")]
        mask = request.pop("mask", None)
        request |= {"init_images": images, "image_mask": mask and decode_image(mask)}
        return self.generate("img2img", processing.StableDiffusionProcessingImg2Img, request)

    def generate(self, tab: str, kind: type, request: dict[str, Any]) -> processing.Processed:
        runner, request = self.runners[tab], dict(request)
        values = self.script_values(runner, request.pop("infotext", None), request.pop("alwayson_scripts", None) or {})
        request["do_not_save_samples"] = not request.pop("save_images", False)
        request["outpath_samples"] = self.outputs
        if unknown := request.keys() - inspect.signature(kind).parameters.keys():
            raise NotImplementedError(f"the double does not know {', '.join(sorted(unknown))}")
        if sd_samplers.find_sampler_config(request.get("sampler_name")) is None:
            raise NotImplementedError(f"the double does not know the sampler {request['sampler_name']}")
        with closing(kind(**request, scripts=runner, script_args=tuple(values))) as p:
            try:
                shared.state.begin(job=f"scripts_{tab}")
                return processing.process_images(p)
            finally:
                shared.state.end()

    def script_values(self, runner: ScriptRunner, infotext: str | None, alwayson: dict[str, dict]) -> list[Any]:
        """The scripts' values: the components' own, over them the infotext's, over them the request's."""
        values = list(runner.defaults)
        if infotext:
            params = parse_generation_parameters(infotext)
            for component, label in runner.infotext_fields:
                value = label(params) if callable(label) else params.get(label)
                if isinstance(value, dict) and value.get("__type__") == "generic_update":
                    value = value.get("value")
                if value is None or component.value is None or component not in runner.inputs:
                    continue
                kind = type(component.value)
                values[runner.inputs.index(component)] = value if isinstance(value, kind) else kind(value)
        titles = [script.title().lower() for script in runner.scripts]
        for title, given in alwayson.items():
            if title.lower() not in titles:
                raise HTTPException(422, f"Script '{title}' not found")
            script = runner.scripts[titles.index(title.lower())]
            if "args" in given:
                count = min(script.args_to - script.args_from, len(given["args"]))
                for index in range(count):
                    values[script.args_from + index] = given["args"][index]
        return values

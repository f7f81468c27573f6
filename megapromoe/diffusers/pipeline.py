"""Images of classes or prompts by a pipeline of diffusers; with equal noise they are those of `megapromoe sample`."""

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from megapromoe.data.autoencoder import Autoencoder, wrap_autoencoder
from megapromoe.diffusers.conditions import ClassNames, TextEncoding
from megapromoe.diffusers.scheduler import ProMoEScheduler
from megapromoe.diffusers.transformer import DiffusersInputError, ProMoETransformer2DModel
from megapromoe.diffusion.samplers import Condition, Labels, guided
from megapromoe.nn.text_condition import TextCondition
from megapromoe.sampling.decoding import decoded

CUSTOM_PIPELINE = str(Path(__file__).with_name("custom_pipeline.py"))
"""The file for `DiffusionPipeline.from_pretrained(folder, custom_pipeline=CUSTOM_PIPELINE, trust_remote_code=True)`."""
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ProMoEPipeline(DiffusionPipeline):
    """Generates images with a `ProMoETransformer2DModel`.

        pipe = ProMoEPipeline.from_pretrained("digits").to("cuda")
        images = pipe(class_labels=[3, "7"], generator=torch.Generator().manual_seed(0)).images

    Args:
        transformer: the model.
        scheduler: `ProMoEScheduler`, or another scheduler of diffusers for flow matching or DDPM.
        vae: decodes the latents that the model generates; None for a model of pixels, or for latents as output.
        text_encoder, tokenizer: of transformers, for prompts; see `load_text_encoder`.
        id2label: class -> name.
        guidance_scale, guidance_low, guidance_high, num_inference_steps: defaults of the call; as `sample.guidance`,
            `sample.guidance_low`, `sample.guidance_high` and `sample.steps`.
        encoder_identity: of the text encoder of the training, with the type to which its features are rounded.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]
    _optional_components = ["vae", "text_encoder", "tokenizer"]
    transformer: ProMoETransformer2DModel
    scheduler: Any
    vae: AutoencoderKL | AutoencoderTiny | None
    text_encoder: torch.nn.Module | None
    tokenizer: Any

    def __init__(
        self,
        transformer: ProMoETransformer2DModel,
        scheduler: SchedulerMixin,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        id2label=None,
        guidance_scale: float = 1.5,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
        num_inference_steps: int = 250,
        encoder_identity=None,
    ):
        # diffusers compares the types of these arguments. Versions before 0.36 can read neither unions nor annotations
        # that are texts, so they have none.
        super().__init__()
        if not hasattr(transformer, "dit"):
            kind = type(transformer).__name__
            raise DiffusersInputError(f"transformer: is a {kind}, must be a ProMoETransformer2DModel")
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        names = None if id2label is None else {str(label): name for label, name in id2label.items()}
        self.register_to_config(
            id2label=names,
            guidance_scale=guidance_scale,
            guidance_low=guidance_low,
            guidance_high=guidance_high,
            num_inference_steps=num_inference_steps,
            encoder_identity=encoder_identity,
        )
        self.class_names = ClassNames(names or {}, self.transformer.dit.config)
        self._text_encoding = TextEncoding(self.transformer.dit.config, encoder_identity)
        self._decoder: tuple[Any, Autoencoder] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As `DiffusionPipeline.from_pretrained`, from safetensors only."""
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def load_text_encoder(self, name: str) -> None:
        """Opens the text encoder of the captions that the model was trained on; `save_pretrained` saves it too.

        Args:
            name: a local folder as transformers saves it, with the tokenizer, or "minilm".

        Raises TextEncoderError if it cannot be opened, DiffusersInputError if it is another than that of the training.
        """
        text_encoder, tokenizer = self._text_encoding.open(name, self._execution_device)
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The classes with the given names. Raises DiffusersInputError for a name that no class has, or several."""
        return self.class_names.ids([label] if isinstance(label, str) else label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        num_images_per_prompt: int = 1,
        guidance_low: float | None = None,
        guidance_high: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generates an image for each class or prompt, all in one batch.

        Args:
            class_labels: numbers or names of classes; the number `num_classes` is no class.
            prompt: texts, for a model of texts; an empty one is no text.
            guidance_scale: 1: no guidance.
            num_inference_steps: steps of the sampling method.
            generator: of the initial noise, and of the noise of "ddpm"; or one for each image.
            latents: initial noise (B, C, H, W), unit normal; None: drawn from `generator`.
            prompt_embeds: features of texts (B, N, text_width), in place of prompts.
            prompt_embeds_mask: which tokens of them are not padding, bool (B, N); None: all.
            num_images_per_prompt: images of each class or prompt, one after the other.
            guidance_low, guidance_high: times in [0, 1] between which guidance is applied.
            output_type: "pil"; "np", float32 (B, H, W, channels), or "pt", (B, channels, H, W), both in [0, 1]; or
                "latent", what the model generates.
            return_dict: False: a tuple.

        Raises DiffusersInputError for arguments that do not fit the model, SampleError for prompts that are too long.
        """
        defaults = self.config
        scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        low = defaults["guidance_low"] if guidance_low is None else guidance_low
        high = defaults["guidance_high"] if guidance_high is None else guidance_high
        steps = defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        self._check(output_type, num_images_per_prompt, steps)
        for name, value in {"guidance_scale": scale, "guidance_low": low, "guidance_high": high}.items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise DiffusersInputError(f"{name} = {value!r}: must be a number")
        device = self._execution_device
        condition = self._condition(class_labels, prompt, prompt_embeds, prompt_embeds_mask, num_images_per_prompt)
        condition = condition.to(device)
        x_BCHW = self._noise(len(condition.is_null()), generator, latents, device)
        two_calls = self.transformer.dit.config.images_depend_on_batch
        predict = guided(self._model_output, condition, scale, low, high, two_calls=two_calls)
        x_BCHW = self._sampled(predict, x_BCHW, steps, generator)
        if not x_BCHW.isfinite().all():
            raise DiffusersInputError("the images have values that are not finite; use another guidance_scale or dtype")
        images: Any = x_BCHW if output_type == "latent" else self._shown(x_BCHW, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(self, output_type: str, images_each: int, steps: int) -> None:
        if output_type not in OUTPUT_TYPES:
            raise DiffusersInputError(f"output_type = {output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}")
        for name, value in {"num_inference_steps": steps, "num_images_per_prompt": images_each}.items():
            if type(value) is not int or value < 1:
                raise DiffusersInputError(f"{name} = {value!r}: must be a whole number, at least 1")
        channels = self.transformer.dit.config.in_channels
        if output_type != "latent" and self.vae is None and channels not in (1, 3):
            raise DiffusersInputError(
                f"output_type = {output_type!r}: the model generates latents of {channels} channels, and the"
                " pipeline has no vae; give from_pretrained(..., vae=AutoencoderKL.from_pretrained(DIR)), or"
                ' output_type="latent"'
            )

    def _condition(
        self, class_labels: Any, prompt: Any, embeds: Tensor | None, mask: Tensor | None, images_each: int
    ) -> Condition:
        """What each image shows."""
        if self.transformer.dit.config.has_text:
            if class_labels is not None or (prompt is None) == (embeds is None):
                raise DiffusersInputError("the model generates images of texts: give either prompt or prompt_embeds")
            if embeds is not None:
                text = self._text_encoding.padded(embeds, mask)
            else:
                texts = [prompt] if isinstance(prompt, str) else list(prompt)
                parts = self.text_encoder, self.tokenizer, self._execution_device
                text = self._text_encoding.of_prompts(texts, *parts)
            rows = torch.arange(len(text), device=text.mask_BN.device).repeat_interleave(images_each)
            return TextCondition(text.features_BND[rows], text.mask_BN[rows])
        if class_labels is None or prompt is not None or embeds is not None:
            raise DiffusersInputError("the model generates images of classes: give class_labels, no prompts")
        label_B = torch.tensor(self.class_names.numbers(class_labels)).repeat_interleave(images_each)
        return Labels(label_B, self.transformer.dit.config.null_class)

    def _noise(self, count: int, generator: Any, latents: Tensor | None, device: torch.device) -> Tensor:
        """The initial noise (B, C, H, W), float32."""
        model = self.transformer.dit.config
        shape = (count, model.in_channels, model.input_size, model.input_size)
        if isinstance(generator, list) and len(generator) not in (1, count):
            raise DiffusersInputError(f"generator: a list of {len(generator)}, must be one for each of {count} images")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise DiffusersInputError(f"latents: have the shape {tuple(latents.shape)}, must be {shape}")
        return latents.to(device, torch.float32)

    def _model_output(
        self, x_BCHW: Tensor, t_B: Tensor, condition: Tensor | TextCondition, num_conditional: int
    ) -> tuple[Tensor, Any]:
        """The model as `guided` calls it."""
        if isinstance(condition, TextCondition):
            what = {"encoder_hidden_states": condition.features_BND, "encoder_attention_mask": condition.mask_BN}
        else:
            what = {"class_labels": condition}
        return self.transformer(x_BCHW, t_B, **what, num_conditional=num_conditional, return_dict=False)

    def _sampled(
        self, predict: Callable[[Tensor, float], Tensor], x_BCHW: Tensor, steps: int, generator: Any
    ) -> Tensor:
        """The loop over the steps of the scheduler."""
        scheduler: Any = self.scheduler
        scheduler.set_timesteps(steps)
        is_ddpm = isinstance(scheduler, DDPMScheduler)
        takes_raw = isinstance(scheduler, ProMoEScheduler) or is_ddpm and "learned" in scheduler.config.variance_type
        draws_noise = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generator} if draws_noise else {}
        scales = hasattr(scheduler, "scale_model_input")  # those of flows do not have it
        x_BCHW = x_BCHW * getattr(scheduler, "init_noise_sigma", 1.0)
        with self.progress_bar(total=len(scheduler.timesteps)) as bar:
            for timestep in scheduler.timesteps:
                input_BCHW = scheduler.scale_model_input(x_BCHW, timestep) if scales else x_BCHW
                out_BCHW = predict(input_BCHW, float(timestep))
                if not takes_raw:  # without the variance, which other schedulers do not take
                    out_BCHW = out_BCHW[:, : x_BCHW.shape[1]]
                x_BCHW = scheduler.step(out_BCHW, timestep, x_BCHW, **options, return_dict=False)[0].float()
                bar.update()
        return x_BCHW

    def _shown(self, x_BCHW: Tensor, output_type: str) -> Any:
        """Decoded images in the form of `output_type`."""
        if self.vae is not None:
            if self._decoder is None or self._decoder[0] is not self.vae:
                self._decoder = self.vae, wrap_autoencoder("vae", self.vae, self._execution_device)
            decoder: Any = self._decoder[1]
            decoder.device = self._execution_device
            x_BCHW = decoded(x_BCHW, decoder)
        images_BCHW = (x_BCHW / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images_BCHW
        images_BHWC = images_BCHW.permute(0, 2, 3, 1).cpu().numpy()
        return images_BHWC if output_type == "np" else self.numpy_to_pil(images_BHWC)

"""Our DiT as a model of diffusers, with the options `model.*` as its config."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from megapromoe.config.model_options import ROUTERS, ModelConfig
from megapromoe.conversion.diffusers_folder import options_of
from megapromoe.conversion.state import config_from
from megapromoe.diffusion.samplers import Labels
from megapromoe.errors import UserError
from megapromoe.nn.dit import AuxiliaryOutput, DiT
from megapromoe.nn.text_condition import TextCondition

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.utils import BaseOutput
except ImportError as error:
    raise ImportError("megapromoe.diffusers needs diffusers: pip install 'megapromoe[images]'") from error


class DiffusersInputError(UserError, ValueError):
    """An argument, or a file of a folder, that a model or pipeline cannot use."""


@dataclass
class ProMoETransformer2DModelOutput(BaseOutput):
    """What the model returns.

    Attributes:
        sample: the raw prediction, (B, C, H, W), or (B, 2C, H, W) with `learn_sigma`.
        auxiliary: losses of the routers, for training, and load of the experts.
    """

    sample: Tensor
    auxiliary: AuxiliaryOutput


def _with_options(init: Any) -> Any:
    """Gives `__init__` the signature that diffusers reads: a keyword for each option of `model.*`."""
    named = inspect.Parameter.KEYWORD_ONLY
    options = [inspect.Parameter(field.name, named, default=field.default) for field in fields(ModelConfig)]
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    init.__signature__ = inspect.Signature([this, *options])
    return init


class ProMoETransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A `DiT` with any router, of classes or texts, that diffusers saves and opens.

    The keywords are the options of `model.*`, which `megapromoe show --keys` lists. The model is `dit`, for use with
    `megapromoe.nn`.

        model = ProMoETransformer2DModel(router="promoe", hidden_size=384, num_classes=10)

    Raises ConfigError for options that cannot be together, DiffusersInputError for a router that is code.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["Block"]  # type: ignore[assignment]
    _repeated_blocks = ["Block"]

    @register_to_config
    @_with_options
    def __init__(self, **options: Any):
        super().__init__()
        router = options.get("router", ModelConfig().router)
        if router not in ROUTERS:
            raise DiffusersInputError(
                f"router = {router!r}: must be one of {', '.join(ROUTERS)}; a model of diffusers executes no code of"
                " users: load the run with megapromoe.sampling.run_model.load_model"
            )
        dtype = torch.get_default_dtype()  # from_pretrained sets that of torch_dtype
        torch.set_default_dtype(torch.float32)
        try:
            self.dit = DiT(config_from({"model": options}).model)
        finally:
            torch.set_default_dtype(dtype)
        self.dit.to(dtype)  # running statistics of routers stay float32

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As `ConfigMixin.from_config`. Raises DiffusersInputError for unknown options; diffusers ignores them."""
        known = {field.name for field in fields(ModelConfig)}
        if isinstance(config, dict) and (unknown := sorted(options_of(config).keys() - known)):
            raise DiffusersInputError(
                f"config.json has {', '.join(unknown)}: no option of model.* of this version; update"
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As `ModelMixin.from_pretrained`, from safetensors only, which must hold all tensors of the model.

        Raises DiffusersInputError for tensors that are missing, unknown or of another shape; diffusers only warns.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        if kwargs.get("device_map") is None:
            # With accelerate, diffusers would create running statistics in torch_dtype, where they lose precision.
            kwargs["low_cpu_mem_usage"] = False
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            reason = str(error).partition("size mismatch for ")[2].split("\n")[0].strip()
            raise DiffusersInputError(
                f"{pretrained_model_name_or_path}: {reason}; the config.json is that of another model"
            ) from error
        model, info = loaded
        wrong = {kind: names for kind in ("missing", "unexpected") if (names := info[f"{kind}_keys"])}
        if wrong:
            listed = "; ".join(f"{len(names)} {kind}, such as {min(names)}" for kind, names in wrong.items())
            raise DiffusersInputError(
                f"{pretrained_model_name_or_path}: its tensors are not those of its config.json ({listed}); restore it"
            )
        return (model, info) if wants_info else model

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        num_conditional: int | None = None,
        return_dict: bool = True,
    ) -> ProMoETransformer2DModelOutput | tuple[Tensor, AuxiliaryOutput]:
        """Predicts velocity or noise.

        Args:
            hidden_states: noisy images or latents (B, C, H, W).
            timestep: model time in [0, 1000], one for all images or (B,).
            class_labels: classes (B,), int64; `num_classes` is the null class.
            encoder_hidden_states: with `condition="text"`, features of the tokens of the texts (B, N, text_width).
            encoder_attention_mask: which of these are not padding (B, N); None: all. A text without tokens is null.
            num_conditional: how many images are not null, if they come first, so that the host need not wait for the
                device; None: any order.
            return_dict: False: a tuple.

        Raises DiffusersInputError unless there are either classes or texts, as the model needs.
        """
        condition = self._condition(class_labels, encoder_hidden_states, encoder_attention_mask)
        images = len(hidden_states)
        t_B = torch.as_tensor(timestep, device=hidden_states.device).float().expand(images)
        order_B = None
        if num_conditional is None:
            is_null_B = condition.is_null()
            num_conditional = images - int(is_null_B.sum())
            if bool(is_null_B[:num_conditional].any()):
                order_B = torch.argsort(is_null_B.int(), stable=True)
                hidden_states, t_B = hidden_states[order_B], t_B[order_B]
        all_B = torch.arange(images, device=hidden_states.device) if order_B is None else order_B
        prediction, auxiliary = self.dit(hidden_states, t_B, condition.select(all_B, num_conditional), num_conditional)
        if order_B is not None:
            prediction = torch.empty_like(prediction).index_copy_(0, order_B, prediction)
        if not return_dict:
            return prediction, auxiliary
        return ProMoETransformer2DModelOutput(sample=prediction, auxiliary=auxiliary)

    def _condition(
        self, class_labels: Tensor | None, features_BND: Tensor | None, mask_BN: Tensor | None
    ) -> Labels | TextCondition:
        if self.dit.config.has_text:
            if features_BND is None or class_labels is not None:
                raise DiffusersInputError(
                    "the model has condition = 'text': give encoder_hidden_states, no class_labels"
                )
            if mask_BN is None:
                mask_BN = torch.ones(features_BND.shape[:2], dtype=torch.bool, device=features_BND.device)
            return TextCondition(features_BND, mask_BN.bool())
        if class_labels is None or features_BND is not None:
            raise DiffusersInputError("the model has condition = 'class': give class_labels, no encoder_hidden_states")
        return Labels(class_labels, self.dit.config.null_class)

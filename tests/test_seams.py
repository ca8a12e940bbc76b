"""Private attributes and signatures of other libraries that the package leans on, a short check for each.

A release that moves one of them fails here, by the seam's name, before anything else fails in a stranger way. Runs on
both ends of the supported range (`tests/compatibility.sh`).
"""

import inspect
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.generation import GenerationMixin

import transformers_dsv3


def parameters(function):
    return list(inspect.signature(function).parameters)


class TestTorch:
    def test_stacks_of_modes(self):
        """`call_refusal` asks what looks at every operator."""
        from torch.utils._python_dispatch import TorchDispatchMode

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                return function(*args, **(kwargs or {}))

        assert torch._C._len_torch_dispatch_stack() == 0
        with Mode() as mode:
            assert torch._C._len_torch_dispatch_stack() == 1 and torch._C._get_dispatch_stack_at(0) is mode
        before = torch._C._len_torch_function_stack()
        with torch.device("cpu"):
            assert torch._C._len_torch_function_stack() == before + 1
            assert type(torch._C._get_function_stack_at(before)).__name__ == "DeviceContext"

    def test_transforms_and_traces(self):
        seen = []

        def look(x):
            seen.append((torch._C._are_functorch_transforms_active(), torch._C._get_tracing_state() is not None))
            return x.sum()

        look(torch.ones(1))
        torch.func.grad(look)(torch.ones(1))
        torch.jit.trace(look, torch.ones(1), check_trace=False)
        assert seen == [(False, False), (True, False), (False, True)]
        assert torch.autograd.forward_ad._current_level == -1
        with torch.autograd.forward_ad.dual_level():
            assert torch.autograd.forward_ad._current_level == 0

    def test_hooks_on_modules(self):
        from torch.nn.modules import module

        for kind in ("forward", "forward_pre", "backward", "backward_pre"):
            assert not getattr(module, f"_global_{kind}_hooks")
            assert not getattr(torch.nn.Linear(1, 1), f"_{kind}_hooks")

    def test_products_and_softmax(self):
        x = torch.tensor([[1.0, 2.0]])
        if torch.backends.mkldnn.is_available():
            product = torch.ops.mkldnn._linear_pointwise(x, torch.eye(2), None, "none", [], "")
            assert torch.equal(product, x)
        nothing = torch.full((1, 2), float("-inf"))
        assert torch.ops.aten._safe_softmax(nothing, -1).tolist() == [[0, 0]]
        probabilities = x.softmax(-1)
        gradient = torch._softmax_backward_data(torch.ones(1, 2), probabilities, -1, torch.float32)
        assert gradient.abs().max() < 1e-6

    def test_tables_of_pipeline_schedules(self):
        """`plan` takes each schedule's order from it, and leaves out the table of sends and receives."""
        from torch.distributed.pipelining import schedules

        assert parameters(schedules._PipelineScheduleRuntime._prepare_schedule_with_comms) == [
            "self",
            "actions",
            "format",
        ]
        assert "_get_pipeline_order()" in inspect.getsource(schedules.PipelineScheduleSingle.__init__)
        action = schedules._Action(3, schedules._ComputationType("I"), 7)
        assert (action.stage_index, action.computation_type.value, action.microbatch_index) == (3, "I", 7)
        assert action.sub_actions is None


class TestTransformers:
    def test_loading(self):
        names = ["model", "state_dict", "checkpoint_files", "load_config", "expected_keys"]
        assert parameters(PreTrainedModel._load_pretrained_model) == names
        from transformers.modeling_utils import LoadStateDictConfig

        fields = {"pretrained_model_name_or_path", "weight_mapping", "hf_quantizer", "ignore_mismatched_sizes"}
        assert fields | {"device_mesh"} <= set(LoadStateDictConfig.__dataclass_fields__)

    def test_renaming_and_reverting(self, make_model, tmp_path):
        from transformers.core_model_loading import WeightRenaming

        renaming = WeightRenaming(r"layers\.3\.", r"mtp\.0\.")
        assert renaming.rename_source_key("model.layers.3.norm.weight")[0] == "model.mtp.0.norm.weight"
        assert renaming.rename_source_key("model.layers.13.norm.weight")[0] == "model.layers.13.norm.weight"
        back = renaming.reverse_transform().rename_source_key("model.mtp.0.norm.weight")[0]
        assert back == "model.layers.3.norm.weight"
        # Saving reverts what a model carries
        make_model().save_pretrained(tmp_path)
        assert AutoModelForCausalLM.from_pretrained(tmp_path)._weight_conversions

    def test_auto_classes_take_another_config(self):
        mapping = AutoModelForCausalLM._model_mapping
        assert parameters(mapping.register)[:2] == ["key", "value"]
        assert mapping[transformers_dsv3.KimiK2Config] is transformers_dsv3.DeepseekV3ForCausalLM
        # What is registered for a config of Transformers' own, which older releases decline to do by `register`
        assert isinstance(mapping._extra_content, dict) and transformers_dsv3.KimiK2Config in mapping._extra_content

    def test_experts_and_attention(self):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        assert parameters(ALL_EXPERTS_FUNCTIONS.get_interface) == ["experts_implementation", "default"]
        assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", len) is len
        assert "requested_experts" in parameters(PreTrainedModel.get_correct_experts_implementation)
        assert hasattr(PreTrainedModel, "_can_set_experts_implementation")

    def test_plans(self, make_model):
        model = make_model()
        assert model._tp_plan and model._ep_plan and hasattr(PreTrainedModel, "init_parallel_plans")
        assert parameters(PreTrainedModel.maybe_distribute_model)[:2] == ["model", "distributed_config"]
        assert parameters(PreTrainedModel.prepare_distribute_model)[0] == "distributed_config"
        gather = parameters(PreTrainedModel.gather_sharded_state_dict_for_save)
        assert gather[:4] == ["self", "model_to_save", "state_dict", "distributed_config"]
        assert parameters(PreTrainedModel.should_save_on_this_rank) == ["self", "is_main_process"]

    def test_generation(self):
        drafting = parameters(GenerationMixin._assisted_decoding)
        for name in ("input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus"):
            assert name in drafting
        checking = parameters(GenerationMixin._validate_generation_mode)
        assert checking == ["self", "generation_mode", "generation_config", "generation_mode_kwargs"]
        assert hasattr(GenerationConfig(), "use_mtp")
        assert parameters(GenerationMixin._prepare_generation_config) == ["self", "generation_config", "kwargs"]

    def test_continuous_batching(self):
        """What `generate_batch` and the server ask of a manager, and what they read of results."""
        from transformers import ContinuousBatchingConfig
        from transformers.generation.continuous_batching import continuous_api, requests
        from transformers.generation.continuous_batching.utils import WorkloadHints

        from transformers_dsv3.generation.manager import ContinuousBatching

        asked = set(re.findall(r"manager\.(\w+)\(", inspect.getsource(continuous_api.ContinuousMixin.generate_batch)))
        entering = continuous_api.ContinuousMixin.continuous_batching_context_manager
        asked |= set(re.findall(r"manager\.(\w+)\(", inspect.getsource(inspect.unwrap(entering))))
        assert asked == {"warmup", "start", "stop", "destroy", "add_requests", "get_result", "is_running"}
        native = continuous_api.ContinuousBatchingManager
        for name in (*asked, "add_request", "cancel_request", "register_result_handler", "request_id_iter"):
            more = ("settings", "pictures")  # native's has neither
            ours = [each for each in parameters(getattr(ContinuousBatching, name)) if each not in more]
            assert ours == [each for each in parameters(getattr(native, name)) if not each.endswith("_kwargs")], name
        output = {"prompt_ids", "generated_tokens", "logprobs", "error", "status", "lifespan", "timestamps"}
        assert output <= set(parameters(requests.GenerationOutput))
        assert requests.RequestStatus.FAILED > requests.RequestStatus.FINISHED > requests.RequestStatus.DECODING
        workload = {"num_requests", "max_prompt_length", "max_generated_length"}
        assert workload == set(parameters(WorkloadHints))
        config = set(vars(ContinuousBatchingConfig()))
        assert {"num_blocks", "max_batch_tokens", "max_requests_per_batch", "allow_block_sharing", "seed"} <= config
        assert {"max_memory_percent", "max_queue_size", "return_logprobs", "drop_unsupported_processors"} <= config
        assert {"page_size", "block_size"} & config

    def test_decoding_loop(self):
        """Of the loop on a CPU: what it replaces, what it calls, and the parts of processors that it takes over."""
        from transformers.generation import logits_process

        names = ["input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"]
        assert parameters(GenerationMixin._sample) == ["self", *names, "model_kwargs"]
        prefill = ["self", "input_ids", "generation_config", "model_kwargs", "is_first_iteration"]
        assert parameters(GenerationMixin._prefill) == prefill
        assert hasattr(GenerationMixin, "_update_model_kwargs_for_generation")
        penalty = logits_process.RepetitionPenaltyLogitsProcessor(1.5)
        assert penalty.penalty == 1.5 and penalty.prompt_ignore_length is None
        kept = {"filter_value": -float("inf"), "min_tokens_to_keep": 1}
        for name, cls in (("top_k", "TopK"), ("top_p", "TopP"), ("min_p", "MinP")):
            warper = getattr(logits_process, f"{cls}LogitsWarper")(1)
            assert {name: 1, **kept}.items() <= vars(warper).items()

    def test_caches(self, make_model):
        model = make_model()
        cache = DynamicCache(config=model.config)
        model(torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
        layer = cache.layers[0]
        assert type(layer) is DynamicLayer and layer.is_initialized and layer.keys.shape[2] == 3
        static = StaticCache(config=model.config, max_cache_len=8)
        model(torch.ones(1, 3, dtype=torch.long), past_key_values=static)
        layer = static.layers[0]
        assert type(layer) is StaticLayer and int(layer.cumulative_length) == 3
        assert all(hasattr(Cache, name) for name in ("crop", "get_seq_length", "is_compileable"))

    def test_checkpointed_layers_keep_their_arguments(self, make_model):
        """A layer that is computed again is given the very positions that it was given first (`pass_of`)."""
        model = make_model(num_nextn_predict_layers=0).train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        seen = []
        attention = model.model.layers[0].self_attn
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
        tokens = torch.ones(1, 4, dtype=torch.long)
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        assert len(seen) == 2 and seen[0] is seen[1]

    def test_trainer_keeps_callbacks_in_a_list(self, make_model, tmp_path):
        trainer = Trainer(make_model(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
        assert isinstance(trainer.callback_handler.callbacks, list)

    def test_the_server_loads_models_in_one_place(self):
        pytest.importorskip("fastapi")
        from transformers.cli.serving.model_manager import ModelManager

        assert parameters(ModelManager._load_model)[:2] == ["self", "model_id_and_revision"]


class TestPeft:
    def test_tuners(self):
        peft = pytest.importorskip("peft")
        from peft.tuners.lora import LoraModel
        from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists

        assert peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA].__mro__[-1] is object
        assert parameters(BaseTuner.inject_adapter)[:3] == ["self", "model", "adapter_name"]
        assert parameters(BaseTuner._check_new_adapter_config) == ["self", "config"]
        remapping = parameters(LoraModel._remap_adapter_state_dict_for_load)
        assert set(remapping) == {"model", "config", "adapter_name", "state_dict"}
        assert check_target_module_exists(peft.LoraConfig(target_modules=["a"]), "x.a")
        excluded = peft.LoraConfig(target_modules=["a"], exclude_modules=["x.a"])
        assert isinstance(check_target_module_exists(excluded, "x.a"), _ExcludedModule)

    def test_wrappers_of_parameters(self):
        pytest.importorskip("peft")
        from peft.tuners.lora.layer import ParamWrapper

        source = inspect.getsource(ParamWrapper)
        for name in ("parameter_name", "num_experts", "lora_A", "lora_B", "scaling", "_LoraFactorsProxy"):
            assert name in source

    def test_what_is_written_of_the_base_model(self):
        """`adapter_config.json` names the class by what `PeftModel` gives to the config's `save_pretrained`."""
        peft = pytest.importorskip("peft")
        assert "auto_mapping_dict" in inspect.getsource(peft.PeftModel.save_pretrained)
        assert "_get_base_model_class" in inspect.getsource(peft.PeftModel.save_pretrained)
        saving = inspect.getsource(peft.PeftModel.save_pretrained)
        assert saving.index("get_peft_model_state_dict(") < saving.index("_get_base_model_class(")
        table = peft.PEFT_TYPE_TO_TUNER_MAPPING.values()
        assert sum(hasattr(tuner, "_get_adapter_state_dict") for tuner in table) >= len(table) - 2

    def test_adapters_are_cast_when_they_are_loaded(self):
        """Adapters that do not fit are refused there: after the weights are set, and not where only they are."""
        peft = pytest.importorskip("peft")
        loading = inspect.getsource(peft.PeftModel.load_adapter)
        assert loading.index("set_peft_model_state_dict(") < loading.index("self.base_model._cast_adapter_dtype(")
        assert "_cast_adapter_dtype" not in inspect.getsource(peft.set_peft_model_state_dict)

    def test_prefixes(self):
        peft = pytest.importorskip("peft")
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as postprocess

        assert "deepseek_v3" in postprocess
        assert "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING" in inspect.getsource(
            peft.PeftModel.get_prompt
        )


class TestTrl:
    def test_trainers_say_what_they_train_for(self):
        """By tags, and by putting a forward of their own in the model's place."""
        trl = pytest.importorskip("trl")
        from trl.trainer import base_trainer, utils

        assert "add_model_tags" in inspect.getsource(base_trainer) + inspect.getsource(trl.SFTTrainer)
        assert "getattr(transformers, config.architectures[0]" in inspect.getsource(utils.create_model_from_path)


class TestAccelerate:
    def test_parallelism_on_a_cpu(self):
        from accelerate.parallelism_config import ParallelismConfig

        assert parameters(ParallelismConfig._validate_accelerator) == ["self", "accelerator"]

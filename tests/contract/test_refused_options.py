"""Every option of GRPO has a meaning in each algorithm here, or is refused by it."""

from dataclasses import fields

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig

from trl_ext.ppo import PPOConfig
from trl_ext.reinforce import ReinforceConfig
from trl_ext.rwr import RWRConfig

# Options of GRPO about generation, rewards and logs, which every policy trainer takes over, and of
# its loss those that are not about the surrogate.
KEPT = """
    model_init_kwargs trust_remote_code disable_dropout cast_lm_head_to_fp32
    num_generations num_generations_eval max_completion_length generation_batch_size
    steps_per_generation num_iterations shuffle_dataset pad_to_multiple_of
    temperature top_p top_k min_p repetition_penalty generation_kwargs chat_template_kwargs
    cache_implementation ds3_gather_for_generation
    use_transformers_continuous_batching transformers_continuous_batching_config
    use_transformers_paged
    use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
    vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size
    vllm_importance_sampling_correction vllm_importance_sampling_mode
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    beta reward_weights mask_truncated_completions max_tool_calling_iterations
    router_aux_loss_coef entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max
    entropy_coef_delta entropy_target
    log_completions log_multimodal num_completions_to_print log_unique_prompts
    log_completions_hub_repo
"""


# And those of its loss that an algorithm gives a meaning of its own.
OWN = {
    RWRConfig: "",
    ReinforceConfig: "loss_type sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    PPOConfig: (
        "loss_type sync_ref_model ref_model_mixup_alpha ref_model_sync_steps epsilon epsilon_high"
    ),
}


@pytest.mark.parametrize("config", OWN, ids=lambda config: config.__name__)
def test_each_option_of_grpo_is_kept_or_refused(config):
    """A new TRL brings new options: decide about each, and write it down here or there."""
    kept = {*KEPT.split(), *OWN[config].split()}
    common = {option.name for option in fields(TrainingArguments)}
    of_grpo = {option.name for option in fields(GRPOConfig)} - common
    refused = config.all_refused().keys()
    assert of_grpo == kept | (refused & of_grpo)
    assert not kept & refused
    options = {option.name for option in fields(config)}
    assert refused <= options, "refused, and TRL has it no more"

CUDA_VISIBLE_DEVICES=0 swift rlhf --rlhf_type grpo --model models/tiny --train_type full \
  --reward_funcs accuracy plugin.brief --reward_weights 1.0 0.5 --external_plugins examples/plugin.py \
  --use_vllm true --vllm_mode colocate --vllm_gpu_memory_utilization 0.5 \
  --dataset data/prompts.jsonl --max_completion_length 64 --num_generations 4 --per_device_train_batch_size 8 \
  --learning_rate=1e-6 --beta 0.01 --epsilon_high 0.28 --dynamic_sample true --overlong_filter true --max_steps 4 \
  --loss_type dapo --log_completions --output_dir output/grpo

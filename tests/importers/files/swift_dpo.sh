#!/bin/bash
# 2 * 24GiB; it's what the examples use
LEARNING_RATE=1e-5
export TOKENIZERS_PARALLELISM=false

PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \
CUDA_VISIBLE_DEVICES=0,1 \
NPROC_PER_NODE=2 \
swift rlhf \
    --rlhf_type dpo \
    --model models/tiny \
    --train_type lora \
    --dataset data/swift_pairs.jsonl#6 'data/pairs.jsonl' \
    --load_from_cache_file true \
    --split_dataset_ratio 0.25 \
    --torch_dtype float32 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 1 \
    --per_device_eval_batch_size 1 \
    --learning_rate ${LEARNING_RATE} \
    --lora_rank 8 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --gradient_accumulation_steps 4 \
    --beta 0.2 --rpo_alpha 0.1 \
    --eval_steps 50 \
    --save_steps 50 \
    --save_total_limit 2 \
    --logging_steps 5 \
    --max_length 2048 \
    --output_dir output \
    --warmup_ratio 0.05 \
    --dataloader_num_workers 4 \
    --deepspeed zero2 \
    --system 'You are a helpful assistant.' \
    --attn_impl flash_attn \
    --dataset_num_proc 4 2>&1 | tee train.log

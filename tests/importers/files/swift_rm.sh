swift rlhf --rlhf_type rm --model models/tiny --train_type lora --dataset data/swift_queries.jsonl \
  --center_rewards_coefficient 0.01 --max_length 512 --split_dataset_ratio 0.25 --output_dir output/rm

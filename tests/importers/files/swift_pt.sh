NPROC_PER_NODE=8 swift pt --model models/tiny --train_type full --dataset data/text.jsonl --max_length 512 \
  --packing true --streaming true --max_steps 10 --deepspeed zero3 --output_dir output/pt

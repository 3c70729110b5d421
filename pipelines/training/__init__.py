"""The rooms behind `pretrain`: sampler, schedule, ZeRO, the loop, checkpoints."""

//! LoRA's shapes, scaling, and CPU forward and backward.

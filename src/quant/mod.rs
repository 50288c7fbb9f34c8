//! Blockwise 4-bit quantisation in bitsandbytes' formats.

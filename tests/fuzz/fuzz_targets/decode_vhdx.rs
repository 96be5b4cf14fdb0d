#![no_main]

vhdfs_fuzz::fuzz!("decode_vhdx");

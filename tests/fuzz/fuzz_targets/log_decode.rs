#![no_main]

vhdfs_fuzz::fuzz!("log_decode");

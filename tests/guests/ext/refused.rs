//! What is left alone, and why.

use std::fs::{self, File};

use super::{MIB, can_test, folder, make, refused_for};
use crate::support::tools::tool;

/// Has `debugfs` do these things to a fresh filesystem, and sees why it is left alone.
fn refused(words: &'static str, commands: &[&str], reason: &str) {
    let folder = folder();
    let path = make(folder.path(), ("fs", words, 32 * MIB));
    let script = folder.path().join("script");
    fs::write(&script, commands.join("\n")).unwrap();
    tool("debugfs", &["-w", "-f", script.to_str().unwrap()], &[&path]);
    refused_for(&path, reason, &format!("{words}: {commands:?}"));
}

#[test]
fn what_its_superblock_says() {
    if !can_test() {
        return;
    }
    for (commands, reason) in [
        (&["ssv state 2"][..], "errors"),
        (&["ssv state 3"], "errors"),
        (&["ssv state 0"], "was not unmounted cleanly"),
        (&["ssv state 5"], "was not unmounted cleanly"),
        (&["ssv last_orphan 12"], "while they were open"),
        (&["ssv journal_dev 0x700"], "another device"),
        (&["ssv free_blocks_count 5"], "but counts 5"),
        (&["ssv blocks_per_group 8188"], "size of groups"),
        (&["ssv first_data_block 2"], "first block"),
        (&["ssv reserved_gdt_blocks 2000"], "reserved blocks"),
        (&["ssv journal_inum 0"], "an inode 0 that does not exist"),
        (&["ssv journal_inum 9"], "an inode 9 that is no plain file"),
        (&["ssv checksum_type 2"], "checksums of an unknown kind"),
        (&["feature FEATURE_I30"], "features that are not known here"),
        (&["feature FEATURE_R30"], "features that are not known here"),
        (&["feature FEATURE_C30"], "features that are not known here"),
        (
            &["feature shared_blocks"],
            "features that are not known here",
        ),
        (
            &["feature needs_recovery orphan_present"],
            "an inode 0 that does not exist",
        ),
        (&["feature orphan_present"], "while they were open"),
        (&["feature ^has_journal needs_recovery"], "but has none"),
    ] {
        refused("-t ext4", commands, reason);
    }
}

#[test]
fn what_does_not_agree() {
    if !can_test() {
        return;
    }
    // With blocks of 1 KiB: 8192 of them make a group.
    for (words, commands, reason) in [
        ("-t ext2", &["set_bg 0 free_blocks_count 5"][..], "counts 5"),
        ("-t ext2", &["set_bg 0 flags 2"], "without the feature"),
        (
            "-t ext2",
            &["set_bg 0 inode_bitmap 1"],
            "two pieces of its metadata",
        ),
        (
            "-t ext2",
            &["set_bg 0 block_bitmap 70000"],
            "where it cannot be",
        ),
        (
            "-t ext2",
            &["set_bg 0 inode_table 8191"],
            "where it cannot be",
        ),
        (
            "-t ext2",
            &["set_bg 1 inode_bitmap 20000"],
            "where it cannot be",
        ),
        ("-t ext2", &["freeb 3"], "its metadata free"),
        ("-t ext2", &["freeb 8193"], "its metadata free"),
        (
            "-t ext2 -O ^resize_inode,sparse_super2",
            &["freeb 24577"],
            "its metadata free",
        ),
        ("-t ext3 -b 1024", &["freeb 2"], "its metadata free"),
        ("-t ext4", &["freeb 1"], "its metadata free"),
        (
            "-t ext4",
            &[
                "jo",
                "jw -b 700 /etc/hostname",
                "jc",
                "feature ^needs_recovery",
            ],
            "does not say so",
        ),
    ] {
        refused(words, commands, reason);
    }
}

#[test]
fn what_is_not_all_there() {
    if !can_test() {
        return;
    }
    let folder = folder();
    let path = make(folder.path(), ("short", "-t ext4", 32 * MIB));
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(31 * MIB).unwrap();
    refused_for(&path, "more than the", "cut short");
    let path = make(
        folder.path(),
        ("journal", "-t ext4 -O journal_dev", 32 * MIB),
    );
    refused_for(
        &path,
        "ext4 journal belongs to a filesystem on another device",
        "a journal",
    );
}

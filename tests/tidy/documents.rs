//! What the documents promise each other: links lead somewhere, and the README stays short.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

const README_LINES: usize = 150;
/// The two commands that the first block of the README has.
const FIRST: [&str; 2] = ["scripts/demo", "scripts/test"];

fn documents(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in [
        "",
        "mount/docs",
        "mount/docs/reference",
        ".github",
        ".github/ISSUE_TEMPLATE",
    ] {
        let entries = fs::read_dir(root.join(folder)).expect("a folder");
        let paths = entries.map(|entry| entry.expect("an entry").path());
        found.extend(paths.filter(|path| path.extension().is_some_and(|found| found == "md")));
    }
    found.sort();
    found
}

/// Its lines but those of code blocks.
fn prose(text: &str) -> Vec<&str> {
    let mut fenced = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        } else if !fenced && !line.starts_with("    ") {
            lines.push(line);
        }
    }
    lines
}

/// The anchors of its headings, as GitHub makes them.
fn anchors(text: &str) -> HashSet<String> {
    let headings = prose(text)
        .into_iter()
        .filter_map(|line| line.strip_prefix('#'));
    headings
        .map(|heading| {
            let words = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
            words.chars().filter(kept).collect::<String>()
        })
        .map(|words| words.replace(' ', "-"))
        .collect()
}

fn links(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for line in prose(text) {
        let targets = line.split("](").skip(1);
        found.extend(targets.filter_map(|rest| rest.split(')').next()));
    }
    found
}

#[test]
fn links_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if !root.join("mount/docs").is_dir() {
        println!("skipped: these are not all of the sources");
        return;
    }
    let mut broken = Vec::new();
    for document in documents(root) {
        let text = fs::read_to_string(&document).expect("a readable document");
        let folder = document.parent().expect("a folder");
        for link in links(&text) {
            if link.starts_with("https://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => document.clone(),
                file => folder.join(file),
            };
            let leads = target.exists()
                && (anchor.is_empty()
                    || fs::read_to_string(&target)
                        .is_ok_and(|text| anchors(&text).contains(anchor)));
            if !leads {
                broken.push(format!("{}: {link}", document.display()));
            }
        }
    }
    assert!(broken.is_empty(), "broken links:\n{}", broken.join("\n"));
}

#[test]
fn the_readme_is_short_and_begins_with_two_commands() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("README.md")).expect("a readable document");
    let lines = text.lines().count();
    assert!(
        lines <= README_LINES,
        "README.md has {lines} lines: mount/docs has the rest"
    );
    let block: Vec<&str> = text
        .lines()
        .skip_while(|line| !line.starts_with("    "))
        .take_while(|line| line.starts_with("    "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(block, FIRST);
}

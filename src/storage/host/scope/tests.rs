use std::fs;
#[cfg(unix)]
use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;

/// ```text
/// in/                the scope
///   base.vhd  Sub/Base.VHD  Sub/deep/child.vhd
/// out/secret.vhd
/// ```
fn tree() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let top = paths::canonical(folder.path()).unwrap();
    fs::create_dir_all(top.join("in/Sub/deep")).unwrap();
    fs::create_dir(top.join("out")).unwrap();
    for file in [
        "in/base.vhd",
        "in/Sub/Base.VHD",
        "in/Sub/deep/child.vhd",
        "out/secret.vhd",
    ] {
        fs::write(top.join(file), file).unwrap();
    }
    (folder, top)
}

fn scope(roots: &[PathBuf]) -> Scope {
    let mut scope = Scope::new();
    for root in roots {
        scope.add(root).unwrap();
    }
    scope
}

/// The first file that `text`, in `child`, leads to, and its content.
fn follow(scope: &Scope, child: &Path, text: &str) -> Option<(PathBuf, String)> {
    let mut places = scope.named(child, text).inside;
    places.extend(scope.guesses(child, text));
    let mut listings = Listings::default();
    let found = (places.iter())
        .filter_map(|place| scope.look(place, &mut listings).ok())
        .flatten()
        .next()?;
    let file = found.open(true).unwrap();
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    let at = crate::units::FileOffset::new(0);
    crate::storage::Storage::read_exact_at(&file, &mut bytes, at).unwrap();
    Some((found.path, String::from_utf8(bytes).unwrap()))
}

#[test]
fn paths_lead_to_files_below() {
    let (_folder, top) = tree();
    let scope = scope(&[top.join("in")]);
    let child = top.join("in/Sub/deep/child.vhd");
    let absolute = top.join("in/base.vhd");
    for (text, expected) in [
        (r".\child.vhd", "in/Sub/deep/child.vhd"),
        (r"..\Base.VHD", "in/Sub/Base.VHD"),
        // The case of each name may differ.
        (r"..\..\sUB\base.vhd", "in/Sub/Base.VHD"),
        (r"..\..\base.vhd", "in/base.vhd"),
        (r".\..\.\..\sub\..\base.vhd", "in/base.vhd"),
        (absolute.to_str().unwrap(), "in/base.vhd"),
        (
            &absolute.to_str().unwrap().replace('/', r"\"),
            "in/base.vhd",
        ),
        // Moved here from elsewhere: what is left of the path counts.
        (r"D:\VMs\in\Sub\Base.VHD", "in/Sub/Base.VHD"),
        (
            r"\\?\Volume{12}\Sub\deep\child.vhd",
            "in/Sub/deep/child.vhd",
        ),
        (r"\\nas\Sub\base.vhd", "in/Sub/Base.VHD"),
        (r"D:\elsewhere\child.vhd", "in/Sub/deep/child.vhd"),
        (r"..\..\..\moved\base.vhd", "in/base.vhd"),
        ("/no/such/place/base.vhd", "in/base.vhd"),
    ] {
        let found = follow(&scope, &child, text);
        let expected = (top.join(expected), expected.to_owned());
        assert_eq!(found, Some(expected), "{text}");
    }
    assert_eq!(follow(&scope, &child, r".\none.vhd"), None);
}

#[cfg(unix)]
#[test]
fn nothing_outside_is_reached() {
    let (_folder, top) = tree();
    let inside = scope(&[top.join("in")]);
    let child = top.join("in/child.vhd");
    symlink("../out/secret.vhd", top.join("in/relative.vhd")).unwrap();
    symlink(top.join("out/secret.vhd"), top.join("in/absolute.vhd")).unwrap();
    symlink("../out", top.join("in/directory")).unwrap();
    symlink("/proc/self/fd/0", top.join("in/magic.vhd")).unwrap();
    symlink("loop.vhd", top.join("in/loop.vhd")).unwrap();
    let secret = top.join("out/secret.vhd");
    let outside = [
        r"..\out\secret.vhd",
        r".\Sub\..\..\out\secret.vhd",
        secret.to_str().unwrap(),
    ];
    for text in outside {
        assert_eq!(inside.named(&child, text).outside, Some(secret.clone()));
        assert_eq!(follow(&inside, &child, text), None, "{text}");
    }
    for text in [
        "relative.vhd",
        "absolute.vhd",
        r"directory\secret.vhd",
        "magic.vhd",
        "loop.vhd",
        r"..\..\..\..\..\..\..\etc\shadow",
    ] {
        assert_eq!(follow(&inside, &child, text), None, "{text}");
    }
    let mut listings = Listings::default();
    for name in ["relative.vhd", "absolute.vhd", "directory/secret.vhd"] {
        let place = inside.named(&child, name).inside.remove(0);
        let looked = inside.look(&place, &mut listings);
        assert!(matches!(looked, Err(Miss::Outside)), "{name}: {looked:?}");
    }
    // Allowed, it is reached.
    let both = scope(&[top.join("in"), top.join("out")]);
    let found = follow(&both, &child, outside[0]);
    assert_eq!(found, Some((secret, "out/secret.vhd".to_owned())));
}

#[cfg(unix)]
#[test]
fn links_that_stay_inside_are_followed() {
    let (_folder, top) = tree();
    let scope = scope(&[top.join("in")]);
    let child = top.join("in/child.vhd");
    symlink("Sub/deep/../Base.VHD", top.join("in/relative.vhd")).unwrap();
    symlink(top.join("in/Sub/Base.VHD"), top.join("in/absolute.vhd")).unwrap();
    symlink(top.join("in/Sub"), top.join("in/directory")).unwrap();
    for text in ["relative.vhd", "absolute.vhd", r"directory\Base.VHD"] {
        let found = follow(&scope, &child, text);
        // Its own parent is to be looked for from where it really is.
        let expected = (top.join("in/Sub/Base.VHD"), "in/Sub/Base.VHD".to_owned());
        assert_eq!(found, Some(expected), "{text}");
    }
}

#[cfg(unix)]
#[test]
fn walking_by_hand_is_as_strict_as_the_kernel() {
    let (_folder, top) = tree();
    let real = top.join("in");
    let root = Pin::directory(&real).unwrap();
    symlink("../out/secret.vhd", real.join("relative.vhd")).unwrap();
    symlink(top.join("out/secret.vhd"), real.join("absolute.vhd")).unwrap();
    symlink("../../base.vhd", real.join("Sub/deep/up.vhd")).unwrap();
    symlink("loop.vhd", real.join("loop.vhd")).unwrap();
    let below = |place: &Path| paths::below(&real, place);
    let walk = |path: &str| beneath::walk(&root, &below, Path::new(path));
    for (path, file) in [
        ("base.vhd", "base.vhd"),
        ("Sub/deep/child.vhd", "Sub/deep/child.vhd"),
        ("Sub/deep/../../base.vhd", "base.vhd"),
        ("Sub/deep/up.vhd", "base.vhd"),
        ("Sub", "Sub"),
        ("", ""),
        ("Sub/..", ""),
    ] {
        let found = walk(path).unwrap();
        assert_eq!(
            found.real_path().unwrap(),
            real.join(file).components().collect::<PathBuf>()
        );
    }
    for path in [
        "..",
        "../out/secret.vhd",
        "Sub/../../out/secret.vhd",
        "relative.vhd",
        "absolute.vhd",
    ] {
        assert!(matches!(walk(path), Err(Miss::Outside)), "{path}");
    }
    for path in ["none.vhd", "base.vhd/x", "Sub/none/x"] {
        assert!(matches!(walk(path), Err(Miss::Missing)), "{path}");
    }
    assert!(matches!(walk("loop.vhd"), Err(Miss::Io(_))));
}

#[cfg(unix)]
#[test]
fn what_is_special_is_neither_opened_nor_waited_for() {
    let (_folder, top) = tree();
    let scope = scope(&[top.join("in")]);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        top.join("in/fifo.vhd"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    fs::create_dir(top.join("in/directory.vhd")).unwrap();
    let mut listings = Listings::default();
    for (name, what) in [("fifo.vhd", "a FIFO"), ("directory.vhd", "a directory")] {
        let place = scope
            .named(&top.join("in/child.vhd"), name)
            .inside
            .remove(0);
        match scope.look(&place, &mut listings) {
            Err(miss @ Miss::Special(_)) => assert!(miss.to_string().contains(what), "{miss}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn endless_paths_cost_little() {
    let (_folder, top) = tree();
    let scope = scope(&[top.join("in"), top.join("out")]);
    let text = r"D:\a\".repeat(60);
    let guesses = scope.guesses(&top.join("in/child.vhd"), &text);
    assert!(guesses.len() <= 3 * MAX_GUESSED_NAMES);
}

#[cfg(windows)]
#[test]
fn windows_paths_lead_below_or_nowhere() {
    let (_folder, top) = tree();
    let inside = scope(&[top.join("in")]);
    let child = top.join(r"in\Sub\deep\child.vhd");
    let at = |name: &str| top.join(name).to_str().unwrap().to_owned();
    let base = at(r"in\base.vhd");
    let unprefixed = base.trim_start_matches(r"\\?\");
    for text in [
        base.clone(),
        base.to_uppercase(),
        format!(r"\\?\{unprefixed}"),
        format!(r"\??\{unprefixed}"),
        // Without a drive, from the root of the child's own.
        unprefixed[2..].to_owned(),
        // From another drive, moved here.
        r"Q:\in\base.vhd".to_owned(),
    ] {
        let found = follow(&inside, &child, &text);
        let expected = (top.join(r"in\base.vhd"), "in/base.vhd".to_owned());
        assert_eq!(found, Some(expected), "{text}");
    }
    let secret = at(r"out\secret.vhd");
    let bare = &secret[2..];
    for text in [
        secret.clone(),
        format!(r"\\?\{secret}"),
        format!(r"\\.\{secret}"),
        format!(r"\\localhost\C${bare}"),
        format!(r"\\?\UNC\localhost\C${bare}"),
        format!(r"\\?\GLOBALROOT\??\{secret}"),
        r"..\..\..\out\secret.vhd".to_owned(),
        format!(r".\{secret}"),
        // Streams and devices.
        r"..\..\base.vhd:stream".to_owned(),
        r"..\..\base.vhd::$DATA".to_owned(),
        r"..\..\base.vhd.".to_owned(),
        r"..\..\base.vhd ".to_owned(),
        r"\\.\PhysicalDrive0".to_owned(),
        r"\\.\pipe\name".to_owned(),
    ] {
        assert_eq!(follow(&inside, &child, &text), None, "{text}");
    }
    let outside = inside.named(&child, &secret).outside;
    assert_eq!(outside, Some(PathBuf::from(secret)));
}

#[cfg(windows)]
#[test]
fn walking_is_strict() {
    let (_folder, top) = tree();
    let real = top.join("in");
    let root = Pin::directory(&real).unwrap();
    let below = |place: &Path| paths::below(&real, place);
    let walk = |path: &str| beneath::walk(&root, &below, Path::new(path));
    for (path, file) in [
        ("base.vhd", "base.vhd"),
        ("Sub/deep/../../BASE.vhd", "base.vhd"),
        ("", ""),
        ("Sub/..", ""),
    ] {
        let found = walk(path).unwrap().real_path().unwrap();
        assert_eq!(
            found.components().collect::<PathBuf>(),
            real.join(file).components().collect::<PathBuf>()
        );
    }
    for path in ["..", "../out/secret.vhd", r"C:\x", "C:x", r"\\nas\x\y"] {
        assert!(matches!(walk(path), Err(Miss::Outside)), "{path}");
    }
    for path in [
        "none.vhd",
        "base.vhd/x",
        "Sub/none/x",
        "base.vhd::$DATA",
        "base.vhd.",
    ] {
        assert!(matches!(walk(path), Err(Miss::Missing)), "{path}");
    }
}

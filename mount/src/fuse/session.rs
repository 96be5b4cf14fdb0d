//! How we and the kernel talk: mount options, threads, request sizes, capabilities.

use std::fs;
use std::io;
use std::path::Path;

use fuser::{Config, FopenFlags, InitFlags, KernelConfig, Session, SessionACL};

use super::{VhdFs, device};
use crate::mounts::{self, FILE_SYSTEM_TYPE};

/// The largest request. More saves nothing measurable and costs memory for each thread.
const MAX_REQUEST: u32 = 1 << 20;

/// How many read-ahead and asynchronous requests may wait for us, on all disks together.
const MAX_BACKGROUND: u16 = 128;

/// What a user decides.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) read_only: bool,
    pub(crate) allow_other: bool,
    /// `None`: by the number of CPUs.
    pub(crate) threads: Option<u16>,
}

/// Mounts `file_system` at `mount_point`. It answers once the session that this returns runs.
///
/// # Errors
/// What mount(2) or fusermount3 say.
pub(crate) fn mount(
    file_system: VhdFs,
    source: &Path,
    mount_point: &Path,
    settings: &Settings,
) -> io::Result<Session<VhdFs>> {
    let options = device::Options {
        source: shown_source(source),
        subtype: subtype(),
        read_only: settings.read_only,
        allow_other: settings.allow_other,
    };
    let mut config = Config::default();
    config.acl = if settings.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(settings.threads.map_or_else(default_threads, usize::from));
    // A user whom fusermount3 gave the descriptor may not be able to open another one.
    config.clone_fd = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .is_ok();
    let device = device::mount(mount_point, &options)?;
    let acl = config.acl;
    let session = Session::from_fd(file_system, device, acl, config)
        .inspect_err(|_| drop(mounts::unmount(mount_point, true)))?;
    raise_read_ahead(mount_point);
    Ok(session)
}

fn subtype() -> &'static str {
    FILE_SYSTEM_TYPE
        .split_once('.')
        .map_or(FILE_SYSTEM_TYPE, |(_, subtype)| subtype)
}

/// Threads mostly wait for the host, so a few more than CPUs serve many requests in flight.
fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(4, |cpus| cpus.get().clamp(4, 16))
}

/// The source as mount tables show it. A comma would end the option.
fn shown_source(source: &Path) -> String {
    let text = source.to_string_lossy();
    if text.contains([',', '\\']) {
        subtype().to_owned()
    } else {
        text.into_owned()
    }
}

/// Agrees with the kernel on what both can do. The flags for handles that bypass its cache.
pub(super) fn configure(config: &mut KernelConfig) -> FopenFlags {
    let mut offered = |wanted| config.add_capabilities(wanted).is_ok();
    // Direct requests of one file at the same time, and lookups in one directory.
    offered(InitFlags::FUSE_ASYNC_DIO);
    offered(InitFlags::FUSE_PARALLEL_DIROPS);
    // No disk has set-id bits that a write would have to clear. Without this, the kernel asks for
    // an extended attribute before each write.
    offered(InitFlags::FUSE_HANDLE_KILLPRIV_V2);
    // Then a handle that was opened with O_DIRECT can bypass the cache by our word, which lets its
    // writes go side by side, and still be mapped.
    let direct = match offered(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP) {
        true => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        false => FopenFlags::empty(),
    };
    // Each setter answers with the nearest value where the wanted one is out of range.
    if let Err(most) = config.set_max_write(MAX_REQUEST) {
        let _ = config.set_max_write(most);
    }
    if let Err(most) = config.set_max_readahead(MAX_REQUEST) {
        let _ = config.set_max_readahead(most);
    }
    let _ = config.set_max_background(MAX_BACKGROUND);
    direct
}

/// The kernel never offers more read-ahead than 128 KiB, but lets root raise it afterwards. Without
/// it, sequential reading is slower, nothing else.
fn raise_read_ahead(mount_point: &Path) {
    let raise = || -> io::Result<()> {
        // Not by stat, which we would have to answer ourselves.
        let mounted = mounts::at(mount_point)?.ok_or(io::ErrorKind::NotFound)?;
        let file = format!("/sys/class/bdi/{}/read_ahead_kb", mounted.device);
        fs::write(file, (MAX_REQUEST / 1024).to_string())
    };
    if let Err(error) = raise() {
        log::debug!("read-ahead stays as it is: {error}");
    }
}

//! Files that only their owner reads, and groups of files that change at once.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The link that is switched.
const CURRENT: &str = "..data";
/// Prefix of the versioned folders.
const VERSION: &str = "..v";

/// What others than the owner may not do.
#[derive(Clone, Copy)]
pub(super) enum Closed {
    /// Read, write or enter: to keys, and what they are in.
    Wholly,
    /// Write.
    ToWriters,
}

/// Creates a folder and its parents, for the owner only.
pub(super) fn private_dir(path: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

/// The same, for the folder that all others are in: who cannot enter it does not reach them either. An empty one is closed.
///
/// # Errors
/// There is one that is not ours, or that has something in it and others may enter.
pub(super) fn outermost_dir(path: &Path) -> io::Result<()> {
    private_dir(path)?;
    #[cfg(unix)]
    {
        let (us, found) = (owner_within(path)?, fs::metadata(path)?);
        let checked = is_ours(&found, us, Closed::Wholly);
        let empty = || Ok::<_, io::Error>(fs::read_dir(path)?.next().is_none());
        if checked.is_ok() || !empty()? || std::os::unix::fs::MetadataExt::uid(&found) != us {
            return checked;
        }
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        // Somebody may have put something into it meanwhile.
        if !empty()? {
            return checked;
        }
    }
    Ok(())
}

/// Reads a file that an earlier process wrote.
///
/// # Errors
/// It cannot be read, is not ours, or is open to others.
pub(super) fn read_own(path: &Path, closed: Closed) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    #[cfg(unix)]
    is_ours(&file.metadata()?, owner_within(path.parent().unwrap_or(Path::new(".")))?, closed)?;
    #[cfg(not(unix))]
    let _ = closed;
    let mut text = String::new();
    io::Read::read_to_string(&mut file, &mut text)?;
    Ok(text)
}

/// Whose files are that we make in this folder.
#[cfg(unix)]
fn owner_within(dir: &Path) -> io::Result<u32> {
    let probe = dir.join(format!(".owner-{}", std::process::id()));
    replace_private(&probe, "")?;
    let owner = fs::symlink_metadata(&probe).map(|made| std::os::unix::fs::MetadataExt::uid(&made));
    fs::remove_file(&probe)?;
    owner
}

#[cfg(unix)]
fn is_ours(found: &fs::Metadata, us: u32, closed: Closed) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let (owner, mode) = (found.uid(), found.mode() & 0o7777);
    let refused = |reason| Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
    if owner != us {
        return refused(format!(
            "it belongs to user {owner} and we are user {us}: its owner could put keys in its place"
        ));
    }
    let (others, remedy) = match closed {
        Closed::Wholly if found.is_dir() => (0o077, "chmod 700"),
        Closed::Wholly => (0o077, "chmod 600"),
        Closed::ToWriters => (0o022, "chmod go-w"),
    };
    match mode & others {
        0 => Ok(()),
        _ => refused(format!("its mode is {mode:03o}, which lets others than its owner in ({remedy})")),
    }
}

/// Writes a file for the owner only, whole or not at all.
pub(super) fn write_private(path: &Path, content: &str) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    replace_private(&temporary, content)?;
    fs::rename(&temporary, path)
}

/// Makes a file where one may be that an earlier process left.
fn replace_private(path: &Path, content: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => create_private(path, content),
    }
}

/// Binds a socket that only the owner can open, at no moment anybody else: it is made in a folder that only the owner enters, and
/// moved from there.
///
/// # Errors
/// There is something else in its place, or it cannot be made.
#[cfg(unix)]
pub(super) fn bind_private(path: &Path) -> io::Result<tokio::net::UnixListener> {
    use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _};
    // What an earlier process left is replaced.
    if let Ok(there) = fs::symlink_metadata(path)
        && !there.file_type().is_socket()
    {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file in its place that is no socket"));
    }
    // The names are short: the path of a socket has 107 bytes at most.
    let within = path.with_file_name(".s");
    match fs::remove_dir_all(&within) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => fs::DirBuilder::new().mode(0o700).create(&within)?,
    }
    let made = within.join("s");
    let listener = tokio::net::UnixListener::bind(&made)?;
    fs::set_permissions(&made, fs::Permissions::from_mode(0o600))?;
    fs::rename(&made, path)?;
    fs::remove_dir(&within)?;
    Ok(listener)
}

/// Replaces the files of `dir` by these, all at once.
///
/// # Errors
/// With the path it is about. The former files are then still in place.
pub(super) fn write_together(dir: &Path, files: &[(&str, &str)]) -> Result<(), (PathBuf, io::Error)> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| (path, error)
    };
    private_dir(dir).map_err(failed(dir))?;
    let version = new_version(dir).map_err(failed(dir))?;
    let folder = dir.join(&version);
    for (name, content) in files {
        let path = folder.join(name);
        create_private(&path, content).map_err(failed(&path))?;
    }
    let current = dir.join(CURRENT);
    let former = fs::read_link(&current).ok();
    replace_link(&current, Path::new(&version)).map_err(failed(&current))?;
    for (name, _) in files {
        let path = dir.join(name);
        let target = Path::new(CURRENT).join(name);
        if fs::read_link(&path).ok().as_ref() != Some(&target) {
            replace_link(&path, &target).map_err(failed(&path))?;
        }
    }
    remove_old(dir, &version, former.as_deref());
    Ok(())
}

/// Creates the next versioned folder: one that no other process, and no earlier one, has made.
fn new_version(dir: &Path) -> io::Result<String> {
    let numbers = fs::read_dir(dir)?.flatten().filter_map(|entry| {
        let name = entry.file_name();
        name.to_str()?.strip_prefix(VERSION)?.parse::<u64>().ok()
    });
    let mut number = numbers.max().unwrap_or(0) + 1;
    loop {
        let version = format!("{VERSION}{number}");
        let mut builder = fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        match builder.create(dir.join(&version)) {
            Ok(()) => return Ok(version),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            Err(error) => return Err(error),
        }
    }
}

/// Keeps the current version and the one before it, which may be read at this moment.
fn remove_old(dir: &Path, current: &str, former: Option<&Path>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let old = name.to_string_lossy().starts_with(VERSION) && name != current && Some(name.as_ref()) != former;
        if old && let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::debug!(%error, path = %entry.path().display(), "an old version stays");
        }
    }
}

fn create_private(path: &Path, content: &str) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    io::Write::write_all(&mut options.open(path)?, content.as_bytes())
}

/// Points `link` at `target` by one rename.
#[cfg(unix)]
fn replace_link(link: &Path, target: &Path) -> io::Result<()> {
    let mut name = link.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = link.with_file_name(name);
    let _ = fs::remove_file(&temporary);
    std::os::unix::fs::symlink(target, &temporary)?;
    fs::rename(&temporary, link)
}

/// Links need a privilege here: files are copied one after the other, and the folder is its own version.
#[cfg(not(unix))]
fn replace_link(link: &Path, target: &Path) -> io::Result<()> {
    let dir = link.parent().unwrap_or(Path::new("."));
    if link.file_name() == Some(CURRENT.as_ref()) {
        for entry in fs::read_dir(dir.join(target))? {
            let entry = entry?;
            fs::copy(entry.path(), dir.join(entry.file_name()))?;
        }
    }
    Ok(())
}

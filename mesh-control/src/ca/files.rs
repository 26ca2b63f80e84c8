//! Files that only their owner reads, and groups of files that change at once.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The link that is switched.
const CURRENT: &str = "..data";
/// Prefix of the versioned folders.
const VERSION: &str = "..v";

/// Creates a folder and its parents, for the owner only.
pub(super) fn private_dir(path: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

/// Writes a file for the owner only, whole or not at all.
pub(super) fn write_private(path: &Path, content: &str) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    create_private(&temporary, content)?;
    fs::rename(&temporary, path)
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

//! Files that are never half-written: content goes to a neighbour first and is renamed over the target.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// Writes `path` through `fill`, aside and then renamed; on any error the old file stays and the neighbour goes.
pub fn write_atomic(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&File>) -> std::io::Result<()>,
) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".ferrotune-");
    public(&mut builder);
    let aside = builder.tempfile_in(folder).map_err(Error::io(path))?;
    let mut writer = BufWriter::new(aside.as_file());
    fill(&mut writer)
        .and_then(|()| writer.flush())
        .and_then(|()| aside.as_file().sync_all())
        .map_err(Error::io(path))?;
    drop(writer);
    aside
        .persist(path)
        .map_err(|error| Error::io(path)(error.error))?;
    Ok(())
}

/// Temporary files are private (0600); what a run leaves behind is as readable as the umask lets any file be.
#[cfg(unix)]
fn public(builder: &mut tempfile::Builder) {
    use std::os::unix::fs::PermissionsExt;
    builder.permissions(std::fs::Permissions::from_mode(0o666));
}

#[cfg(not(unix))]
fn public(_: &mut tempfile::Builder) {}

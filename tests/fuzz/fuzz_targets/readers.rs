//! Any bytes under any of the readers' extensions: records, skips or one error.

#![no_main]

use ferrotune::data::{Columns, EXTENSIONS, Files};
use libfuzzer_sys::fuzz_target;

const PACKINGS: [&str; 3] = ["", ".gz", ".zst"];

fuzz_target!(|input: &[u8]| {
    let [kind, content @ ..] = input else {
        return;
    };
    let extension = EXTENSIONS[usize::from(*kind) % EXTENSIONS.len()];
    let packing = PACKINGS[usize::from(*kind) / EXTENSIONS.len() % PACKINGS.len()];
    let Ok(folder) = tempfile::tempdir() else {
        return;
    };
    let path = folder.path().join(format!("a.{extension}{packing}"));
    if std::fs::write(&path, content).is_err() {
        return;
    }
    let Ok(files) = Files::open(&[path], &Columns::default()) else {
        return;
    };
    // Reading ends after the first error.
    let errors = files.filter(Result::is_err).count();
    assert!(errors <= 1);
});

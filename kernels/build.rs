//! Compiles every `kernels/*.cu` into one fatbin for the crate to embed (feature `cuda`).
//!
//! nvcc comes from pip (`cuda-toolkit` in pyproject.toml) or a CUDA installation; no GPU and no driver are needed.
//! A file whose name ends in `_sm90a.cu` uses what only Hopper has and is compiled for that alone.
//!
//! An image is named by a hash of all that it is made from and kept in `kernels/` of cargo's target folder: whatever
//! profile, features or environment builds next, it is compiled once.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fmt::Write, fs, thread};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// SASS for A100 and its family, H100, B200 and RTX 50; PTX for every other chip from sm_80 on.
const TARGETS: &[&str] = &[
    "arch=compute_80,code=[sm_80,compute_80]",
    "arch=compute_90,code=sm_90",
    "arch=compute_100,code=sm_100",
    "arch=compute_120,code=sm_120",
];
const HOPPER_ONLY: &[&str] = &["arch=compute_90a,code=sm_90a"];

/// The major version whose drivers `src/cuda/driver.rs` asks for.
const CUDA_MAJOR: u32 = 13;
const INSTALL: &str = "pip install 'cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2'";

/// Prints the folders of the `nvidia.cu13` wheels, one a line.
const FIND_WHEELS: &str = "
import importlib.util
try:
    spec = importlib.util.find_spec('nvidia.cu13')
except ImportError:
    spec = None
for folder in (spec and spec.submodule_search_locations) or ():
    print(folder)
";

fn main() {
    if let Err(error) = run() {
        for line in error.to_string().lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    println!("cargo::rerun-if-changed=kernels");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    for name in ["NVCC", "CUDA_HOME", "NVCC_APPEND_FLAGS"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("kernels");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let sources = if env::var("CARGO_CFG_TARGET_OS")? == "linux" {
        files(&folder, "cu")?
    } else {
        Vec::new() // CUDA has no other platform that this extension is built for
    };
    let mut list = String::from("&[\n");
    if !sources.is_empty() {
        for (source, image) in sources.iter().zip(compile(&folder, &sources, &out)?) {
            let image = image.display().to_string();
            writeln!(list, "    ({:?}, include_bytes!({image:?})),", stem(source))?;
        }
    }
    list.push(']');
    fs::write(out.join("images.rs"), list)?;
    Ok(())
}

/// The sources' images: compiles those that are not there, as many at a time as cargo runs jobs.
fn compile(folder: &Path, sources: &[PathBuf], out: &Path) -> Result<Vec<PathBuf>> {
    let (nvcc, version) = find_nvcc()?;
    let kept = target_folder(out).join("kernels");
    fs::create_dir_all(&kept)?;
    let mut shared = DefaultHasher::new();
    version.hash(&mut shared);
    env::var_os("NVCC_APPEND_FLAGS").hash(&mut shared); // nvcc reads it: `-lineinfo` for profilers, say
    let mut images = Vec::new();
    let mut stale = Vec::new();
    for source in sources {
        let arguments = arguments(source);
        let mut hash = shared.clone();
        arguments.hash(&mut hash);
        let mut read = BTreeMap::new();
        read_with_headers(folder, source, &mut read)?;
        read.hash(&mut hash);
        let image = kept.join(format!("{}-{:016x}.fatbin", stem(source), hash.finish()));
        if !image.is_file() {
            stale.push((source, arguments, image.clone()));
        }
        images.push(image);
    }
    let jobs: usize = env::var("NUM_JOBS")?.parse()?;
    let workers = jobs.clamp(1, stale.len().max(1));
    let threads = jobs.div_ceil(stale.len().max(1)).min(TARGETS.len() + 1);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut failures = Vec::new();
        while let Some((source, arguments, image)) = stale.get(next.fetch_add(1, Ordering::Relaxed))
        {
            if let Err(error) = build(&nvcc, folder, source, arguments, threads, image) {
                failures.push(error.to_string());
            }
        }
        failures
    };
    let failures: Vec<String> = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .flat_map(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|_| vec!["a worker of the build panicked".into()])
            })
            .collect()
    });
    if failures.is_empty() {
        Ok(images)
    } else {
        Err(failures.join("\n").into())
    }
}

/// What a file and the headers in `folder` that it includes, and those that they do, hold.
fn read_with_headers(
    folder: &Path,
    file: &Path,
    read: &mut BTreeMap<PathBuf, String>,
) -> Result<()> {
    let name = file.strip_prefix(folder)?.to_path_buf();
    if read.contains_key(&name) {
        return Ok(());
    }
    let text = fs::read_to_string(file)?;
    let headers: Vec<_> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("#include \"")?.strip_suffix('"'))
        .map(|header| folder.join(header))
        .collect();
    read.insert(name, text);
    headers
        .iter()
        .try_for_each(|header| read_with_headers(folder, header, read))
}

/// Paths are relative to `kernels`, where nvcc runs: it writes the source's into the image.
fn arguments(source: &Path) -> Vec<String> {
    let targets = if stem(source).ends_with("_sm90a") {
        HOPPER_ONLY
    } else {
        TARGETS
    };
    let mut arguments: Vec<String> = [
        "-fatbin",
        "-std=c++17",
        "-O3",
        "-Werror=all-warnings",
        "--compress-mode=size",
    ]
    .map(String::from)
    .to_vec();
    arguments.extend(targets.iter().map(|target| format!("-gencode={target}")));
    arguments.push("-I.".into());
    arguments.push(format!("{}.cu", stem(source)));
    arguments
}

fn build(
    nvcc: &Path,
    folder: &Path,
    source: &Path,
    arguments: &[String],
    threads: usize,
    image: &Path,
) -> Result<()> {
    let aside = image.with_extension(format!("{}.part", std::process::id()));
    let output = Command::new(nvcc)
        .current_dir(folder)
        .args(arguments)
        .args(["--threads", &threads.to_string(), "-o"])
        .arg(&aside)
        .output()
        .map_err(|error| format!("{}: {error}", nvcc.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim_end();
        let more = String::from_utf8_lossy(&output.stdout);
        return Err(format!("nvcc failed on {}:\n{said}\n{more}", source.display()).into());
    }
    fs::rename(aside, image)?;
    Ok(())
}

/// Cargo's target folder: `out` is `[TRIPLE/]PROFILE/build/PACKAGE/out` there. `out` itself where it is laid out otherwise.
fn target_folder(out: &Path) -> &Path {
    let above = |folders| out.ancestors().nth(folders);
    match (above(2), above(4)) {
        (Some(build), Some(folder)) if build.ends_with("build") => {
            let triple = env::var("TARGET").is_ok_and(|triple| folder.ends_with(triple));
            folder.parent().filter(|_| triple).unwrap_or(folder)
        }
        _ => out,
    }
}

/// The first nvcc of the right version, and what it says of that: `$NVCC`, `$CUDA_HOME`, the wheels of the Pythons
/// about, `$PATH`.
fn find_nvcc() -> Result<(PathBuf, String)> {
    let mut seen = BTreeSet::new();
    let mut refused = String::new();
    if let Some(nvcc) = env::var_os("NVCC") {
        let nvcc = std::path::absolute(nvcc)?;
        let version = check(&nvcc).map_err(|why| format!("$NVCC is {}: {why}", nvcc.display()))?;
        return Ok((nvcc, version));
    }
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let wheels = pythons()
        .into_iter()
        .flat_map(|python| wheels_of(&python))
        .map(|folder| folder.join("bin/nvcc"));
    for nvcc in home.into_iter().chain(wheels).chain(on_path("nvcc")) {
        let nvcc = std::path::absolute(nvcc)?;
        if !nvcc.is_file() || !seen.insert(nvcc.clone()) {
            continue;
        }
        match check(&nvcc) {
            Ok(version) => return Ok((nvcc, version)),
            Err(why) => write!(refused, "\n  {}: {why}", nvcc.display())?,
        }
    }
    let heading = if refused.is_empty() {
        ""
    } else {
        "\nfound, but no use:"
    };
    Err(format!(
        "the CUDA kernels need nvcc {CUDA_MAJOR}: {INSTALL} (or set NVCC or CUDA_HOME, \
         or build without the feature `cuda`){heading}{refused}"
    )
    .into())
}

fn check(nvcc: &Path) -> std::result::Result<String, String> {
    let output = Command::new(nvcc)
        .arg("--version")
        .output()
        .map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let release = text.split("release ").nth(1).unwrap_or_default();
    let major = release.split('.').next().and_then(|text| text.parse().ok());
    match major {
        Some(CUDA_MAJOR) => Ok(text.into_owned()),
        Some(other) => Err(format!("version {other}, not {CUDA_MAJOR}")),
        None => Err("its --version names no release".into()),
    }
}

/// The Python that builds, the active environment's, and every one on the path.
fn pythons() -> Vec<PathBuf> {
    let named = env::var_os("PYO3_PYTHON").map(PathBuf::from);
    let active = env::var_os("VIRTUAL_ENV").map(|folder| Path::new(&folder).join("bin/python"));
    let found = ["python3", "python"].into_iter().flat_map(on_path);
    named.into_iter().chain(active).chain(found).collect()
}

fn wheels_of(python: &Path) -> Vec<PathBuf> {
    let Ok(output) = Command::new(python).args(["-c", FIND_WHEELS]).output() else {
        return Vec::new();
    };
    let folders = String::from_utf8_lossy(&output.stdout);
    folders.lines().map(PathBuf::from).collect()
}

fn on_path(program: &str) -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|folder| folder.join(program))
        .filter(|file| file.is_file())
        .collect()
}

fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn stem(source: &Path) -> String {
    let stem = source.file_stem().unwrap_or_default();
    stem.to_string_lossy().into_owned()
}

//! Where settings come from: flag, then `SPINNEY_*`, then the user's file, then the system's.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use server::Problem;
use server::snapshots::{Code, Settings};

use crate::errors::misuse;

/// The system's file.
const SYSTEM_FILE: &str = "/etc/spinney/config.toml";

/// Keys of a configuration file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    state: Option<PathBuf>,
    qemu: Option<PathBuf>,
    qemu_img: Option<PathBuf>,
    accel: Option<String>,
}

/// A value, and who gave it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Setting<T> {
    pub(crate) value: T,
    pub(crate) origin: String,
}

/// All settings.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// State folder, absolute.
    pub(crate) state: Setting<PathBuf>,
    /// QEMU's executable; none: looked for.
    pub(crate) qemu: Option<Setting<PathBuf>>,
    /// qemu-img; none: looked for.
    pub(crate) qemu_img: Option<Setting<PathBuf>>,
    /// Accelerator; none: probed.
    pub(crate) accel: Option<Setting<String>>,
}

/// What surrounds the program; handed in, so that tests need not change their own process.
struct Surroundings<'a> {
    variable: &'a dyn Fn(&str) -> Option<OsString>,
    root: bool,
    system_file: &'a Path,
}

impl Config {
    /// Reads everything. `state` is the flag.
    pub(crate) fn load(state: Option<&Path>) -> Result<Self, Problem> {
        let surroundings = Surroundings {
            // An empty variable is an unset one.
            variable: &|name| std::env::var_os(name).filter(|value| !value.is_empty()),
            root: rustix::process::getuid().is_root(),
            system_file: Path::new(SYSTEM_FILE),
        };
        Self::gather(state, &surroundings)
    }

    fn gather(state: Option<&Path>, around: &Surroundings<'_>) -> Result<Self, Problem> {
        let mut files = Vec::new();
        if let Some(path) = user_file(around) {
            files.push((read(&path)?, path));
        }
        files.push((read(around.system_file)?, around.system_file.to_owned()));

        let variable = |name: &str| {
            (around.variable)(name)
                .map(|value| Setting { value: PathBuf::from(value), origin: name.to_owned() })
        };
        let state = state
            .map(|path| Setting { value: path.to_owned(), origin: "--state".to_owned() })
            .or_else(|| variable("SPINNEY_STATE"))
            .or_else(|| in_files(&files, |file| file.state.clone()))
            .map_or_else(|| default_state(around), Ok)?;
        let value = std::path::absolute(&state.value)
            .map_err(|error| misuse("the state folder has no absolute path").because(&error))?;
        let accel = variable("SPINNEY_ACCEL")
            .map(|s| Setting { value: s.value.to_string_lossy().into_owned(), origin: s.origin });
        Ok(Self {
            state: Setting { value, ..state },
            qemu: variable("SPINNEY_QEMU").or_else(|| in_files(&files, |file| file.qemu.clone())),
            qemu_img: variable("SPINNEY_QEMU_IMG").or_else(|| in_files(&files, |file| file.qemu_img.clone())),
            accel: accel.or_else(|| in_files(&files, |file| file.accel.clone())),
        })
    }

    /// What the engine wants to know.
    pub(crate) fn settings(&self) -> Settings {
        Settings {
            state: self.state.value.clone(),
            qemu: self.qemu.as_ref().map(|setting| setting.value.clone()),
            qemu_img: self.qemu_img.as_ref().map(|setting| setting.value.clone()),
            accel: self.accel.as_ref().map(|setting| setting.value.clone()),
            // Whatever has become of our file since: an update has replaced it, a build has removed it.
            warden: Some(PathBuf::from("/proc/self/exe")),
        }
    }
}

fn in_files<T>(files: &[(File, PathBuf)], get: impl Fn(&File) -> Option<T>) -> Option<Setting<T>> {
    files
        .iter()
        .find_map(|(file, path)| get(file).map(|value| Setting { value, origin: path.display().to_string() }))
}

fn user_file(around: &Surroundings<'_>) -> Option<PathBuf> {
    let base = (around.variable)("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let base = base.or_else(|| (around.variable)("HOME").map(|home| Path::new(&home).join(".config")))?;
    Some(base.join("spinney/config.toml"))
}

fn default_state(around: &Surroundings<'_>) -> Result<Setting<PathBuf>, Problem> {
    let default = |value: PathBuf| Setting { value, origin: "default".to_owned() };
    if around.root {
        return Ok(default(PathBuf::from("/var/lib/spinney")));
    }
    let base = (around.variable)("XDG_STATE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let base = base.or_else(|| (around.variable)("HOME").map(|home| Path::new(&home).join(".local/state")));
    base.map(|base| default(base.join("spinney"))).ok_or_else(|| {
        misuse("there is no place for the state folder: HOME is not set").hint("give one with --state DIR")
    })
}

fn read(path: &Path) -> Result<File, Problem> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(File::default());
        }
        Err(error) => {
            return Err(Problem::new(Code::Failed, format!("cannot read {}", path.display())).because(&error));
        }
    };
    let mut file: File = toml::from_str(&text)
        .map_err(|error| misuse(format!("{} is not a configuration", path.display())).because(&error))?;
    // Paths are relative to the file that names them.
    let folder = path.parent().unwrap_or(Path::new("/"));
    for named in [&mut file.state, &mut file.qemu, &mut file.qemu_img].into_iter().flatten() {
        *named = folder.join(&*named);
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn gather(
        flag: Option<&str>,
        variables: &[(&str, &str)],
        root: bool,
        system: &str,
    ) -> Result<Config, Problem> {
        let folder = tempfile::tempdir().unwrap();
        let system_file = folder.path().join("config.toml");
        std::fs::write(&system_file, system).unwrap();
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        let variable = |name: &str| variables.get(name).map(OsString::from);
        Config::gather(
            flag.map(Path::new),
            &Surroundings { variable: &variable, root, system_file: &system_file },
        )
    }

    #[test]
    fn flag_before_variable_before_file_before_default() {
        let home = ("HOME", "/home/ann");
        let system = "state = '/srv/spinney'\naccel = 'tcg'";
        let origin = |config: Config| (config.state.value, config.state.origin);
        let got = origin(gather(Some("/f"), &[home, ("SPINNEY_STATE", "/v")], false, system).unwrap());
        assert_eq!(got, ("/f".into(), "--state".into()));
        let got = origin(gather(None, &[home, ("SPINNEY_STATE", "/v")], false, system).unwrap());
        assert_eq!(got, ("/v".into(), "SPINNEY_STATE".into()));
        let config = gather(None, &[home], false, system).unwrap();
        assert_eq!(config.state.value, Path::new("/srv/spinney"));
        assert!(config.accel.unwrap().origin.ends_with("config.toml"));
        let got = origin(gather(None, &[home], false, "").unwrap());
        assert_eq!(got, ("/home/ann/.local/state/spinney".into(), "default".into()));
        assert_eq!(origin(gather(None, &[], true, "").unwrap()).0, Path::new("/var/lib/spinney"));
    }

    #[test]
    fn the_user_file_comes_before_the_system_file() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("spinney")).unwrap();
        std::fs::write(folder.path().join("spinney/config.toml"), "qemu = 'bin/qemu'").unwrap();
        let xdg = folder.path().to_str().unwrap();
        let config = gather(None, &[("HOME", "/h"), ("XDG_CONFIG_HOME", xdg)], false, "qemu = '/q'").unwrap();
        assert_eq!(config.qemu.unwrap().value, folder.path().join("spinney/bin/qemu"));
    }

    #[test]
    fn a_misspelt_key_is_an_error_with_its_line() {
        let problem = gather(None, &[("HOME", "/h")], false, "stat = '/x'").unwrap_err();
        assert_eq!(problem.code, Code::Usage);
        assert!(problem.cause.first().unwrap().contains("stat"), "{problem:?}");
    }
}

//! The groups of a state folder: each with a folder, a key and a page store of its own, opened at start.
//!
//! A store that cannot be opened (another key, packs of a later format) is no reason for the others not to be: its group is there,
//! with the reason, and whoever needs its pages hears that.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use pages::{GroupKey, HostUser, Store};

use crate::catalog::{GroupRow, TargetRow, no_group};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::owner::{User, let_owners_through, make_folder};

/// A group, with its page store if that could be opened.
#[derive(Debug)]
pub(crate) struct OpenGroup {
    pub(crate) row: GroupRow,
    /// `groups/ID`.
    pub(crate) folder: PathBuf,
    store: Result<Arc<Store>, Unusable>,
}

/// Why a store could not be opened.
#[derive(Clone, Debug)]
struct Unusable {
    code: Code,
    why: String,
    hint: &'static str,
}

impl OpenGroup {
    /// Opens what is there. The default group's store is made if it is not; no other ever is.
    fn open(groups: &Path, row: GroupRow) -> Self {
        let folder = groups.join(&row.id);
        let store = open_store(&folder, row.is_default(), host_user(row.owner)).map(Arc::new);
        if let Err(unusable) = &store {
            tracing::error!(group = row.name, why = unusable.why, "a group cannot be used");
        }
        let group = Self { row, folder, store };
        // Of a group that an earlier version made, his view could not read the packs.
        if let Err(error) = group.give_to_owner() {
            tracing::warn!(group = group.row.name, %error, "its owner cannot get at what is his");
        }
        group
    }

    /// A new one. On an error nothing of it is left.
    pub(crate) fn make(groups: &Path, row: GroupRow) -> Result<Self> {
        let folder = groups.join(&row.id);
        let made = make_folder(&folder)
            .and_then(|()| make_folder(&layers_of(&folder)))
            .and_then(|()| {
                let key = GroupKey::generate()?;
                Ok(Store::create_for(folder.join("pages"), key, host_user(row.owner))?)
            })
            .and_then(|store| {
                let group = Self { row, folder: folder.clone(), store: Ok(Arc::new(store)) };
                group.give_to_owner()?;
                sync_folder(groups)?;
                Ok(group)
            });
        made.inspect_err(|_| drop(fs::remove_dir_all(&folder)))
    }

    /// Its page store.
    pub(crate) fn store(&self) -> Result<&Arc<Store>> {
        self.store.as_ref().map_err(|unusable| {
            Error::new(unusable.code, format!("the group {} cannot be used", self.row.name))
                .because(unusable.why.as_str())
                .hint(unusable.hint)
        })
    }

    /// Why its store cannot be used, if it cannot.
    pub(crate) fn problem(&self) -> Option<&str> {
        self.store.as_ref().err().map(|unusable| unusable.why.as_str())
    }

    /// The folder of its disk layers.
    pub(crate) fn layers_folder(&self) -> PathBuf {
        layers_of(&self.folder)
    }

    /// Whom its machines' QEMU runs as, if that is not whoever runs us.
    pub(crate) fn runs_as(&self) -> Option<User> {
        User::other_than_us(self.row.owner)
    }

    /// Gives the owner a file that his QEMU writes to.
    pub(crate) fn gives(&self, file: &Path) -> Result<()> {
        self.runs_as().map_or(Ok(()), |owner| owner.owns_alone(file))
    }

    /// The key is its owner's, and the pages are his to read; what only passes by gets no further than to what is his.
    fn give_to_owner(&self) -> Result<()> {
        let Some(owner) = self.runs_as() else { return Ok(()) };
        owner.gets_through(&self.folder)?;
        owner.gets_through(&self.layers_folder())?;
        owner.gets_through(&self.folder.join("pages"))?;
        for folder in ["pages/packs", "pages/index"].map(|name| self.folder.join(name)) {
            owner.gets_through(&folder)?;
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                owner.reads(&entry.path())?;
            }
        }
        owner.owns_alone(&self.folder.join("pages/key"))
    }
}

/// The groups that there are.
#[derive(Debug, Default)]
pub(crate) struct Groups(RwLock<Vec<Arc<OpenGroup>>>);

impl Groups {
    /// Opens every group of the catalog.
    pub(crate) fn open(state: &Path, rows: Vec<GroupRow>) -> Result<Self> {
        let folder = state.join("groups");
        if rows.iter().any(|row| User::other_than_us(row.owner).is_some()) {
            let_owners_through(state)?;
        }
        let mut groups = Vec::new();
        for row in rows {
            let own = folder.join(&row.id);
            if row.is_default() {
                make_folder(&own)?;
                make_folder(&layers_of(&own))?;
            }
            groups.push(Arc::new(OpenGroup::open(&folder, row)));
        }
        Ok(Self(RwLock::new(groups)))
    }

    /// All of them, the default one first, then by name.
    pub(crate) fn all(&self) -> Vec<Arc<OpenGroup>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The one of this id.
    pub(crate) fn by_id(&self, id: &str) -> Result<Arc<OpenGroup>> {
        let found = self.all().into_iter().find(|group| group.row.id == id);
        found.ok_or_else(|| Error::new(Code::NotFound, format!("there is no group with the id {id}")))
    }

    /// The one of this name.
    pub(crate) fn by_name(&self, name: &str) -> Result<Arc<OpenGroup>> {
        self.all().into_iter().find(|group| group.row.name == name).ok_or_else(|| no_group(name))
    }

    pub(crate) fn add(&self, group: OpenGroup) {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        all.push(Arc::new(group));
        all.sort_by(|a, b| (!a.row.is_default(), &a.row.name).cmp(&(!b.row.is_default(), &b.row.name)));
    }

    pub(crate) fn remove(&self, id: &str) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).retain(|group| group.row.id != id);
    }
}

impl Engine {
    /// The group that a target belongs to.
    pub(crate) fn group_of(&self, target: &TargetRow) -> Result<Arc<OpenGroup>> {
        self.groups.by_id(&target.group)
    }

    /// The pages of the group that a target belongs to.
    pub(crate) fn store_of(&self, target: &TargetRow) -> Result<Arc<Store>> {
        Ok(Arc::clone(self.group_of(target)?.store()?))
    }

    /// The folder of a group's disk layers.
    pub(crate) fn layers_folder(&self, group: &str) -> PathBuf {
        layers_of(&self.state().join("groups").join(group))
    }

    /// The group of that name; the default one if none is named.
    pub(crate) fn named_group(&self, name: Option<&str>) -> Result<Arc<OpenGroup>> {
        self.groups.by_name(name.unwrap_or(crate::catalog::DEFAULT_GROUP))
    }
}

fn layers_of(folder: &Path) -> PathBuf {
    folder.join("layers")
}

/// Who reads a group's pages, if he is not whoever runs us: his view does.
pub(crate) fn host_user(owner: u32) -> Option<HostUser> {
    User::other_than_us(owner).map(|user| user.ids_alone())
}

fn open_store(folder: &Path, make: bool, reader: Option<HostUser>) -> Result<Store, Unusable> {
    let pages = folder.join("pages");
    let unusable = |error: pages::Error| {
        let mut why = error.to_string();
        let mut next = std::error::Error::source(&error);
        while let Some(cause) = next {
            why.push_str(&format!(": {cause}"));
            next = cause.source();
        }
        let (code, hint) = match &error {
            pages::Error::NewerFormat { .. } => {
                (Code::Precondition, "use the Spinney that wrote it, or a later one")
            }
            pages::Error::WrongKey { .. } | pages::Error::BadKey { .. } => (Code::Damaged, KEY_BACK),
            _ => (
                Error::from(error).code(),
                "mend that, then `spinney serve --stop`: the next start tries again",
            ),
        };
        Unusable { code, why, hint }
    };
    // The key is the last thing that `create` writes before any page: without both there is nothing to lose.
    let has_packs = fs::read_dir(pages.join("packs")).is_ok_and(|mut packs| packs.next().is_some());
    let key = pages.join("key");
    match (key.exists(), make && !has_packs) {
        (true, _) => {
            GroupKey::load(&key).and_then(|key| Store::open_for(&pages, key, reader)).map_err(unusable)
        }
        (false, true) => {
            GroupKey::generate().and_then(|key| Store::create_for(&pages, key, reader)).map_err(unusable)
        }
        (false, false) => Err(Unusable {
            code: Code::Damaged,
            why: format!("its key is gone: {}", key.display()),
            hint: KEY_BACK,
        }),
    }
}

const KEY_BACK: &str =
    "put the group's own key back, then `spinney serve --stop`: the next start tries again";

/// Makes the names in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| {
        Error::new(Code::Failed, format!("{} cannot be made durable", folder.display())).because(error)
    })
}

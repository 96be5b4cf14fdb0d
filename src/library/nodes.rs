//! Numbers for the files and directories that a front end refers to.
//!
//! A node belongs to one backing file or directory, whatever its name: it survives a rename, and
//! all hard links of a disk share it, so that a front end which caches content by node never
//! caches one disk twice. A file that takes another one's place gets a new number; no number is
//! ever used again.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::storage::host::pin::Identity;
use crate::storage::host::pin::Kind;

/// The number of a disk or directory of a [`Library`](super::Library), as long as somebody holds a
/// reference to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(u64);

impl NodeId {
    /// The library's root directory. It needs no reference.
    pub const ROOT: Self = Self(1);

    /// The node with that number, for a front end that passes numbers through its own protocol.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Its number: at least 1.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// What a node stands for.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) identity: Identity,
    pub(super) is_directory: bool,
    /// Where it was last found, below the root, under its name on the host.
    pub(super) path: PathBuf,
    references: u64,
    /// The content that its last opener saw.
    content: Option<u64>,
}

/// All nodes that have references, and the root.
#[derive(Debug)]
pub(super) struct Nodes {
    by_id: HashMap<NodeId, Node>,
    by_identity: HashMap<Identity, NodeId>,
    next: u64,
}

impl Nodes {
    pub(super) fn new(root: Identity) -> Self {
        let node = Node {
            identity: root,
            is_directory: true,
            path: PathBuf::new(),
            references: 1,
            content: None,
        };
        Self {
            by_id: HashMap::from([(NodeId::ROOT, node)]),
            by_identity: HashMap::from([(root, NodeId::ROOT)]),
            next: NodeId::ROOT.get() + 1,
        }
    }

    pub(super) fn get(&self, id: NodeId) -> Option<&Node> {
        self.by_id.get(&id)
    }

    /// The node of what was just found at `path`, with one more reference.
    pub(super) fn refer(&mut self, identity: Identity, kind: Kind, path: &Path) -> NodeId {
        let Some(&id) = self.by_identity.get(&identity) else {
            let id = NodeId(self.next);
            self.next += 1;
            let node = Node {
                identity,
                is_directory: kind == Kind::Directory,
                path: path.to_owned(),
                references: 1,
                content: None,
            };
            self.by_id.insert(id, node);
            self.by_identity.insert(identity, id);
            return id;
        };
        if let Some(node) = self.by_id.get_mut(&id) {
            node.references = node.references.saturating_add(1);
            if node.path != path && id != NodeId::ROOT {
                path.clone_into(&mut node.path);
            }
        }
        id
    }

    /// Gives `count` references back.
    pub(super) fn forget(&mut self, id: NodeId, count: u64) {
        let Some(node) = self.by_id.get_mut(&id) else {
            return;
        };
        node.references = node.references.saturating_sub(count);
        if node.references == 0 && id != NodeId::ROOT {
            let identity = node.identity;
            self.by_id.remove(&id);
            self.by_identity.remove(&identity);
        }
    }

    /// Notes that `id` is opened with this content. Whether it is what its last opener saw.
    pub(super) fn see_content(&mut self, id: NodeId, content: u64) -> bool {
        self.by_id
            .get_mut(&id)
            .is_some_and(|node| node.content.replace(content) == Some(content))
    }
}

//! How memory that is not needed any more goes back to the system.

/// From how many bytes on an allocation is a mapping of its own, which goes back when it is freed: buffers, pieces of the index.
#[cfg(target_env = "gnu")]
const MAPPED_FROM: libc::c_int = 128 << 10;
/// Heaps for what is smaller. Operations run on threads of their own, and glibc would give each of them a heap, up to eight for a
/// processor, that keeps what it once had.
#[cfg(target_env = "gnu")]
const HEAPS: libc::c_int = 4;

/// Has glibc give back what a take or a goto has freed. By itself it learns from the first large buffer that is freed to keep such ones:
/// after six takes and two gotos of a machine of 4 GiB the daemon held 80 MB, and like this it holds 19 MB.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
pub(crate) fn give_back() {
    // SAFETY: mallopt(3) takes two numbers and sets parameters of malloc; it touches no memory of ours, and takes malloc's own locks.
    let set = unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM) == 1
            && libc::mallopt(libc::M_TRIM_THRESHOLD, MAPPED_FROM) == 1
            && libc::mallopt(libc::M_ARENA_MAX, HEAPS) == 1
    };
    if !set {
        tracing::warn!("malloc keeps what it has");
    }
}

/// Other libraries have ways of their own.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn give_back() {}

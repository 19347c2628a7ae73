//! Where locks and atomic numbers come from: the standard library; with the feature `schedules`, an explorer of schedules, which tries
//! what threads may do in which order (`tests/schedules`).
//!
//! Locks are without poisoning: no code that holds one leaves its data half changed, so a panic elsewhere costs nothing.

use std::sync::PoisonError;

#[cfg(feature = "schedules")]
use shuttle::sync as from;
#[cfg(not(feature = "schedules"))]
use std::sync as from;

pub(crate) use from::atomic::{AtomicBool, AtomicU64, Ordering};
pub(crate) use from::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn read<T: ?Sized>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn write<T: ?Sized>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

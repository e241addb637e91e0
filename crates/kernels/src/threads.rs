//! The threads that the CPU backend works with.

use burn::tensor::Device;

/// Runs `work` on one of the threads that share the work of `device`'s operations.
///
/// On the CPU, an operation that is called from another thread hands its work over and sleeps until
/// it is done, which takes as long as the small operations of one token themselves. Called from one
/// of the threads, it begins at once. On other devices `work` runs where it is called.
///
/// While an operation waits for its parts, its thread may run other work: `work` is to hold no lock
/// across one.
pub fn among_threads<T: Send>(device: &Device, work: impl FnOnce() -> T + Send) -> T {
    #[cfg(feature = "flex")]
    if *device == Device::flex() {
        return rayon::scope(|_| work());
    }
    let _ = device;
    work()
}

//! The threads of the CPU backend.

use burn::tensor::Device;

/// Runs `work` on a thread of the pool that runs the operations of `device`.
///
/// On the CPU, an operation called from outside of the pool hands its work over and sleeps until it is
/// done, which takes as long as the operations of a single token. Called from a thread of the pool, it
/// begins at once. On other devices, `work` runs on the calling thread.
///
/// While an operation waits for its tasks, its thread may run other work of the pool, so `work` must
/// not hold a lock during an operation.
///
/// # Panics
/// If `work` panics.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
///
/// let device = Device::flex();
/// let sum = kernels::among_threads(&device, || Tensor::<1>::ones([4], &device).sum());
/// assert_eq!(sum.into_scalar::<f32>(), 4.0);
/// ```
pub fn among_threads<T: Send>(device: &Device, work: impl FnOnce() -> T + Send) -> T {
    #[cfg(feature = "flex")]
    if *device == Device::flex() {
        return rayon::scope(|_| work());
    }
    let _ = device;
    work()
}

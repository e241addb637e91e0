use std::path::Path;

use burn::tensor::Device;

use super::load::load;
use crate::{CheckpointError, Pretrained, Result};

/// Loads a directory as [`load`] does, if it is the one that [`save`](crate::save) wrote.
///
/// Every file must have the sum that the directory's `SHA256SUMS` states, and every file must be listed
/// but signatures of the list (`SHA256SUMS.*`), texts (`*.md`) and hidden files. If the directory has a
/// certificate, the model must be the certified one, and the result has it as
/// [`Pretrained::certificate`]. Files are read again after they were checked: they must not change
/// while the model is in use.
///
/// Neither the list nor the certificate is signed: whoever can replace the model can replace them. Sign
/// `SHA256SUMS`, or keep it where the source of the model cannot write.
///
/// # Errors
/// The first difference: [`tensor_files::Error::File`] for a changed file,
/// [`CheckpointError::NotListed`] for an added one, [`peft::Error::NotMerged`] if the model is not the
/// one of the certificate; otherwise as [`load`].
///
/// # Examples
/// ```no_run
/// let lm = models::load_verified("Llama-2-7b-4bit-task", &burn::tensor::Device::flex())?;
/// match &lm.certificate {
///     Some(certificate) => println!("{certificate}"),
///     None => println!("the files are those that were saved; no merge is certified"),
/// }
/// # Ok::<(), models::Error>(())
/// ```
pub fn load_verified(dir: impl AsRef<Path>, device: &Device) -> Result<Pretrained> {
    let dir = dir.as_ref();
    let unlisted = tensor_files::check_sums(dir)?;
    if let Some(name) = unlisted.iter().find(|name| !is_beside(name)) {
        let path = dir.join(name);
        return Err(CheckpointError::NotListed { path }.into());
    }
    let lm = load(dir, device)?;
    if let Some(certificate) = &lm.certificate {
        certificate.verify(&lm.model)?;
    }
    Ok(lm)
}

/// Whether a file may be added to a saved model: a signature of the list, a text, what is hidden.
fn is_beside(name: &str) -> bool {
    name.starts_with("SHA256SUMS.") || name.starts_with('.') || name.ends_with(".md")
}

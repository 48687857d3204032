"""A trained model becomes the folder that users download: `package.export_folder`, and `verify.verify_export` that it ends with."""

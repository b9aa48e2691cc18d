package qupath.lib.projects

import qupath.lib.images.ImageData

class ProjectImageEntry {

    ImageData data
    Object builder
    boolean saved = false
    private String name

    String getImageName() { name }

    void setImageName(String name) { this.name = name }

    ImageData readImageData() { data }

    void saveImageData(ImageData imageData) {
        assert imageData.is(data)
        saved = true
    }

}
